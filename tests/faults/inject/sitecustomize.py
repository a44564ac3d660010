"""Lets a job of a sweep meet its fate: VITRIM_FATES says which, by seed."""

import json
import os
import signal
import sys


def _meet(fate: str) -> None:
    match fate:
        case "exit":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise RuntimeError("as it was told to")


def _arm(fate: str) -> None:
    import vitrim.cli.app
    import vitrim.pipeline

    whole = vitrim.pipeline._runner

    def phases(*args: object) -> object:
        _meet(fate)
        return whole(*args)

    vitrim.pipeline._runner = phases
    vitrim.cli.app.main()
    os._exit(0)


_fates = json.loads(os.environ.get("VITRIM_FATES", "{}"))
_words = sys.orig_argv
if _fates and "-m" not in _words[3:]:
    for _word in _words:
        if _word.startswith("seed=") and _word.removeprefix("seed=") in _fates:
            sys.argv = ["vitrim", *_words[3:]]
            try:
                _arm(_fates[_word.removeprefix("seed=")])
            except SystemExit as _stop:
                if isinstance(_stop.code, str):
                    sys.stderr.write(_stop.code)
                os._exit(_stop.code if isinstance(_stop.code, int) else 1)
            except BaseException as _error:
                sys.stderr.write(repr(_error))
                os._exit(1)
