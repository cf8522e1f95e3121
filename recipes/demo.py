"""A page in the browser that shows a float model and its 1-bit twin side by side: prediction, time, size.

    python recipes/glue.py --task demo && python recipes/demo.py runs/demo
    python recipes/demo.py --float FOLDER --packed FOLDER --task sst2

The first form takes the output folder of `recipes/glue.py`. The page is served to this machine only, unless `--host`
says otherwise, and needs no connection to the internet. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import transformers
from demo_models import load_contest
from glue_tasks import TASKS
from recipe_folder import RunFolder

HOW_TO_BEGIN = (
    "there are no models to show: `python recipes/glue.py --task demo` makes some in a minute, "
    "`python recipes/demo.py runs/demo` shows them; or pass --float MODEL and --packed MODEL."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Serves the page until it is interrupted."""
    options = parse_arguments(argv)
    if importlib.util.find_spec("gradio") is None:
        raise SystemExit("the page is made with Gradio, which is not installed: pip install 'rebnn_hf[demo]'")
    from demo_page import SERVER, build_page

    transformers.utils.logging.disable_progress_bar()
    float_name, packed_name, task = find_models(options)
    try:
        contest = load_contest(float_name, packed_name)
    except ValueError as error:
        raise SystemExit(f"{error}") from None
    page = build_page(contest, task)
    _, url, _ = page.launch(server_name=options.host, server_port=options.port, prevent_thread_lock=True, **SERVER)
    print(f"The page is at {url} (Ctrl-C ends it).", flush=True)
    page.block_thread()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: if it names no models, or too many.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", metavar="RUN_FOLDER", help="output folder of recipes/glue.py")
    parser.add_argument("--float", metavar="MODEL", help="folder or Hub name of a float text classifier")
    parser.add_argument("--packed", metavar="MODEL", help="folder or Hub name of the packed model made from it")
    parser.add_argument("--task", choices=list(TASKS), help="of --float and --packed: names boxes, brings examples")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0: to the whole network")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    options = parser.parse_args(argv)
    named = [options.float, options.packed]
    if options.run is None and named == [None, None]:
        parser.error(HOW_TO_BEGIN)
    if options.run is None and None in named:
        parser.error("--float and --packed belong together: pass both, or a RUN_FOLDER.")
    if options.run is not None and [*named, options.task] != [None, None, None]:
        parser.error("RUN_FOLDER brings its own models and task: leave out --float, --packed and --task.")
    return options


def find_models(options: argparse.Namespace) -> tuple[str | Path, str | Path, str | None]:
    """The float model, the packed one, and the task where it is known.

    Raises:
        SystemExit: the folder holds no finished run.
    """
    if options.run is None:
        return options.float, options.packed, options.task
    run = RunFolder(options.run)
    results = run.results()
    if results is None:
        raise SystemExit(
            f"{options.run} holds no results.json, so no finished run: pass the --output_dir of recipes/glue.py."
        )
    return results["arguments"]["teacher"] or run.folder("teacher"), run.folder("packed"), results["task"]


if __name__ == "__main__":
    main()
