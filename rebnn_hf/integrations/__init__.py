"""Glue to other libraries: leaves that nothing else imports."""
