"""Runs a notebook from top to bottom and keeps what its cells show.

    python -m tools.notebook docs/tour.ipynb                        # into the file itself
    python -m tools.notebook docs/tour.ipynb --out elsewhere.ipynb

It needs `pip install '.[notebook]'`. If a cell fails, the file stays as it was.
"""

import argparse
from pathlib import Path

from storage import disk


def run(path: str | Path, timeout: int = 600):
    """The notebook at a path, run from top to bottom in a fresh kernel, in the notebook's folder.

    timeout: seconds for each cell. ValueError names the cell that fails.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install '.[notebook]'") from None
    with open(path, encoding="utf-8") as file:
        try:
            notebook = nbformat.read(file, as_version=4)
        except (ValueError, nbformat.reader.NotJSONError) as error:
            raise ValueError(f"{path}: not a notebook ({disk.shortened(error)})") from None
    # Without the times of day, a notebook whose outputs are the same is the same file.
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(Path(path).parent)}})
    try:
        client.execute()
    except CellExecutionError as error:
        failed = sum(1 for cell in notebook.cells if cell.get("execution_count"))
        raise ValueError(f"{path}: code cell {failed} fails: {error.ename}: "
                         f"{disk.shortened(error.evalue)}") from None
    except (CellTimeoutError, DeadKernelError) as error:
        raise ValueError(f"{path}: {disk.shortened(error)}") from None
    # No versions of this machine's Python.
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec,
                         "language_info": {"name": "python"}}
    return notebook


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m tools.notebook", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", metavar="NOTEBOOK", help="file to run")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: NOTEBOOK)")
    with disk.command("notebook.py"):
        args = parser.parse_args(argv)
        notebook = run(args.notebook)
        import nbformat
        disk.write_text(args.out or args.notebook, nbformat.writes(notebook) + "\n")
        print(f"wrote {args.out or args.notebook}")


if __name__ == "__main__":
    main()
