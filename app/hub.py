"""Snapshots from the Hugging Face Hub: from the cache, and from the network only when the caller says so."""

import re
from pathlib import Path
from typing import Literal

from certs.errors import first_line

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


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
