"""The Hub, or a mirror of it: whatever goes wrong on the way from there becomes one message."""

from contextlib import contextmanager

from support.errors import BadInput

ELSEWHERE = "Use a local folder, or set HF_ENDPOINT to a mirror"  # where a model can come from


@contextmanager
def loading(what: str, name: str, instead: str, *errors: type[Exception]):
    """Load `name` from a folder or the Hub; `what` it is, "model" or "dataset", what to do `instead`, and which
    `errors` mean that it cannot be loaded, beside the usual ones.

    Raises:
        BadInput: it cannot be loaded. Says whether the name, the rights, the Hub or the way there is to blame.
    """
    import httpx
    from huggingface_hub.utils import logging
    from safetensors import SafetensorError

    logging.set_verbosity_error()  # retries would bury the one line that helps
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError, ImportError, httpx.HTTPError, SafetensorError, *errors) as error:
        reason = trouble(error, what, name, instead) or f"it cannot be loaded ({str(error).strip()}). {instead}"
        raise BadInput(f"{what} {name!r}: {reason}") from error


def trouble(error: Exception, what: str, name: str, instead: str) -> str | None:
    """What the Hub answered, or how the way there failed, by the first error of a chain that says so: libraries wrap
    them in vaguer ones. None where none does."""
    import httpx
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants, errors

    hub, cause = constants.ENDPOINT, error
    page = f"https://huggingface.co/{'datasets/' if what == 'dataset' else ''}{name}"
    licence = f"Accept its licence on {page}, then `hf auth login` with a token of that account"
    while cause is not None:
        if isinstance(cause, DatasetNotFoundError):  # datasets hides the Hub's answer, and tells the two by words
            if "gated dataset" in str(cause):
                return f"{hub} does not give it to everybody. {licence}"
            return f"{hub} has none of this name, or a private one: `hf auth login`. {instead}"
        if isinstance(cause, errors.HfHubHTTPError) and not isinstance(cause, errors.EntryNotFoundError):
            status, phrase = cause.response.status_code, cause.response.reason_phrase
            if isinstance(cause, errors.GatedRepoError) or status == 403:
                return f"{hub} does not give it to everybody ({status}). {licence}"
            if isinstance(cause, errors.RevisionNotFoundError):
                return f"{hub} has it, but not in this revision"
            if isinstance(cause, errors.RepositoryNotFoundError):
                return f"{hub} has none of this name ({status}), or a private one: `hf auth login`. {instead}"
            return f"{hub} answers {status} {phrase}. Try again later. {instead}"
        if isinstance(cause, httpx.TimeoutException):
            return f"{hub} does not answer in time ({cause}). Try again later. {instead}"
        if isinstance(cause, httpx.TransportError | errors.OfflineModeIsEnabled):
            return f"{hub} is out of reach, or the connection breaks off ({cause}). {instead}"
        cause = cause.__cause__ or cause.__context__
    return None
