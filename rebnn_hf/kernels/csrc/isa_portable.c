/* Plain C: runs on every CPU, and says with its few lines what the others compute. */
#include "kernels.h"

static int runs(void) { return 1; }

const rebnn_isa rebnn_portable = REBNN_TABLE("portable", runs);
