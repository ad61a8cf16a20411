"""The Hugging Face Hub: snapshots, from the network only when the caller says so, and published policies."""

import json
import re
from pathlib import Path
from typing import Any, Literal

from app.tensorfile import ADAPTERS, WEIGHTS
from certs.errors import FleetError, ModelError, StorageError, first_line

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# What a policy is. An allow-list: whatever else comes to lie in a checkpoint stays at home.
_FEDERATION = "federation.json"
_TEXTS = ("config.json", "policy_preprocessor.json", "policy_postprocessor.json", _FEDERATION)
_STATES = "policy_*processor_step_*.safetensors"
# Seconds without a byte after which a request has failed: huggingface_hub sets no limit of its own, and the Hub
# takes a while to put a large upload's parts together before it answers.
_SILENCE_S = 120.0


class NotInReachError(Exception):
    """A repository is not in the cache, or could not be fetched; the message is one line from the client."""


def is_repository(name: str) -> bool:
    """Whether ``name`` has the form ``owner/name``."""
    return _REPOSITORY.fullmatch(name) is not None


def snapshot(
    repository: str,
    patterns: list[str],
    *,
    kind: Literal["model", "dataset"],
    online: bool,
    revision: str | None = None,
) -> Path:
    """The directory of a cached snapshot; ``online`` first fetches the files that match ``patterns``.

    Tries ``revision`` and then the main branch. Raises NotInReachError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    for attempt in (revision, None):
        try:
            return Path(
                snapshot_download(
                    repository,
                    repo_type=kind,
                    revision=attempt,
                    allow_patterns=patterns,
                    local_files_only=not online,
                )
            )
        except (RevisionNotFoundError, LocalEntryNotFoundError) as error:
            if attempt is None:
                raise NotInReachError(first_line(error)) from error
        # HfHubHTTPError (refused, gated, not found) is an OSError as well.
        except (OSError, HFValidationError) as error:
            raise NotInReachError(first_line(error)) from error
    raise AssertionError  # the second attempt returns or raises


def push(checkpoint: Path, repository: str, *, private: bool, card: Path, message: str) -> str:
    """Publish a checkpoint's policy with ``card`` as its README.md, as one commit; returns the commit's address.

    Makes ``repository`` when it is not there, with the token of ``HF_TOKEN`` or of ``hf auth login``. A public
    repository is refused when ``private`` is asked. Raises ModelError where the checkpoint or the repository's name
    is at fault and StorageError where the Hub is; neither holds the token or an upload's signed address.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token, is_offline_mode

    if not is_repository(repository):
        raise ModelError(f"{repository!r} is not of the form 'owner/name': nothing was pushed.")
    contents = _contents(checkpoint, card)
    failed = f"Checkpoint {checkpoint.name} was not pushed to {repository}"
    if is_offline_mode():
        raise StorageError(f"{failed}: HF_HUB_OFFLINE=1 switches the Hub off, set it to 0.")
    token = get_token()
    if not token:
        raise StorageError(f"{failed}: there is no token, set HF_TOKEN to one that may write.")
    _prepare_client()
    try:
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        # For a repository that was there before, create_repo ignores what it was asked for.
        if private and not api.model_info(repository).private:
            raise StorageError(
                f"{failed}: it is public and push-private is set, make it private or choose another."
            )
        commit = api.create_commit(
            repository,
            [
                CommitOperationAdd(name, str(source) if isinstance(source, Path) else source)
                for name, source in contents.items()
            ],
            commit_message=message,
        )
    except FleetError:
        raise
    except Exception as error:  # noqa: BLE001 - huggingface_hub, httpx and hf_xet each raise their own kinds
        # Without its cause: a traceback would show what the sentence leaves out.
        raise StorageError(f"{failed}: {_reason(error, token)}.") from None
    return str(commit.commit_url)


def _contents(checkpoint: Path, card: Path) -> dict[str, Path | bytes]:
    """What is published, by its name in the repository: a file, or the bytes that stand for one."""
    others = (path for name in (ADAPTERS, _STATES) for path in sorted(checkpoint.glob(name)))
    weights = [checkpoint / WEIGHTS, *others]
    for path in (weights[0], card):
        if not path.is_file():
            raise ModelError(f"{path} is missing: only a whole checkpoint is pushed.")
    contents: dict[str, Path | bytes] = {path.name: path for path in weights}
    for path in (checkpoint / name for name in _TEXTS):
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if path.name == _FEDERATION:
                # The record of a round that is not over yet, for a ServerApp that goes on with it.
                content.pop("record", None)
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(
                f"{path} cannot be read ({error}): only a whole checkpoint is pushed."
            ) from error
        # Where a VLM or a base lies on this machine is of no use elsewhere, and nobody's business.
        contents[path.name] = (json.dumps(_without_paths(content), indent=2) + "\n").encode()
    return {**contents, "README.md": card}


def _without_paths(content: Any) -> Any:
    """``content`` with every absolute path in it cut to its last part."""
    if isinstance(content, dict):
        return {key: _without_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_paths(value) for value in content]
    if isinstance(content, str) and content.startswith("/"):
        return Path(content).name
    return content


def _prepare_client() -> None:
    """Bound every wait of huggingface_hub, and keep its bars and the signed addresses it warns with out of the log."""
    import httpx
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import disable_progress_bars, logging

    set_client_factory(lambda: httpx.Client(follow_redirects=True, timeout=_SILENCE_S))
    disable_progress_bars()
    logging.set_verbosity_error()


def _reason(error: BaseException, token: str) -> str:
    """What went wrong, in words of ours wherever the Hub answered: its client's name the signed address."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    causes = [error]
    # An upload's error comes wrapped in a RuntimeError that says only which file it was.
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status == 401:
                return "the Hub does not accept the token (401), set HF_TOKEN to one that may write"
            if status == 403:
                return "the token may not write there (403), set HF_TOKEN to one that may"
            said = _without_token(cause.server_message or "it gave no reason", token)
            return f"the Hub answered {status} ({said})"
        if isinstance(cause, httpx.LocalProtocolError | UnicodeEncodeError):
            # The token is the one header that is not the client's own; the error quotes it.
            return "HF_TOKEN holds a character that no token has"
        if isinstance(cause, httpx.TransportError):
            return f"the Hub could not be reached ({_without_token(str(cause), token)})"
    return _without_token(f"{type(error).__name__}: {error}", token)


def _without_token(text: str, token: str) -> str:
    """The first line of ``text``, without the token."""
    return first_line(Exception(text.replace(token, "***")))
