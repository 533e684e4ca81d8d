"""`launcher train -m` with the stub in place of the training: `controller_main.py OVERRIDE…`."""

import sys
from pathlib import Path

from launcher.base.errors import LauncherError
from launcher.sweep import jobs, main

STUB = Path(__file__).with_name("stub_job.py")


def run(arguments: list[str]) -> int:
    jobs.job_command = lambda job: [sys.executable, str(STUB), *job.arguments]
    try:
        return main(arguments, None)
    except LauncherError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
