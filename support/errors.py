"""The two ways a run ends with one message instead of a traceback, and messages for what cannot be loaded or typed."""

import re
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import httpx
from datasets.exceptions import DatasetNotFoundError  # its text is all that is left of the Hub's answer
from huggingface_hub import constants, errors
from huggingface_hub.utils import logging
from safetensors import SafetensorError


class BadInput(ValueError):
    """What the user gave cannot be used: the message says what, where and what to change."""


class RunStopped(Exception):
    """A run ended before its last step, for a reason that is no bug: the message says which, and what to do.
    `status` is the process', `outcome` is for run.json."""

    def __init__(self, message: str, status: int = 1, outcome: str = "failed"):
        super().__init__(message)
        self.status, self.outcome = status, outcome


ELSEWHERE = "Use a local folder, or set HF_ENDPOINT to a mirror"  # where a model can come from


@contextmanager
def loading(what: str, name: str, instead: str, *errors: type[Exception]):
    """Turn the usual errors of loading a "model" or "dataset" (`what`), and `errors`, into one BadInput, which says
    whether the name, the rights, the Hub or the network is to blame, and what to do `instead`."""
    logging.set_verbosity_error()  # retries would bury the one line that helps
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError, ImportError, httpx.HTTPError, SafetensorError, *errors) as error:
        said = (what == "dataset" and error.__cause__) or error  # that a table cannot be read has its reason as cause
        reason = trouble(error, what, name, instead) or f"it cannot be loaded ({str(said).strip()}). {instead}"
        here = "" if Path(name).exists() else "no such folder here, and "
        raise BadInput(f"{what} {name!r}: {here}{reason}") from error


def trouble(error: Exception, what: str, name: str, instead: str) -> str | None:
    """The Hub's answer, or the network's failure, where `error` or one of its causes names it; None where none does."""
    hub, cause = constants.ENDPOINT, error  # libraries wrap them in vaguer errors
    while cause is not None:
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        answer = f" ({status})" if status else ""
        if isinstance(cause, errors.GatedRepoError) or status == 403 or "is a gated dataset" in str(cause):
            page = f"https://huggingface.co/{'datasets/' if what == 'dataset' else ''}{name}"
            then = f"Accept its licence on {page}, then `hf auth login` with a token of that account"
            return f"{hub} does not give it to everybody{answer}. {then}"
        if isinstance(cause, errors.RepositoryNotFoundError | DatasetNotFoundError):
            return f"{hub} has none of this name{answer}, or a private one: `hf auth login`. {instead}"
        if status and status != 404:  # 404: a missing file or revision, which the library's message names
            return f"{hub} answers {status} {cause.response.reason_phrase}. Try again later. {instead}"
        if isinstance(cause, httpx.TransportError | errors.OfflineModeIsEnabled):
            return f"{hub} is out of reach, or the connection breaks off ({cause}). {instead}"
        cause = cause.__cause__ or cause.__context__
    return None


def meant(word: str, known: list[str], renamed: dict[str, str]) -> str:
    """The end of an unknown flag's message: what to try, by the patterns of `renamed`, else the nearest."""
    name = word.removeprefix("--").partition("=")[0].replace("-", "_").lower()
    near = [new for old, new in renamed.items() if re.fullmatch(old, name)]
    near += [f"--{flag}" for flag in get_close_matches(name, known, cutoff=0.7)]
    return f"; try {near[0]}" if near else "; --help lists all flags"
