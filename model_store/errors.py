"""What can go wrong with a model store.

StoreError
├── NameInvalid        (ValueError)       a model name, an alias or a reference that cannot exist
├── ArtifactNotFound   (KeyError)         no such model, version or alias
├── ArtifactCorrupt    (ValueError)       what is stored is not what was published
├── PayloadRefused     (ValueError)       a folder that may not be published
├── VersionExists      (FileExistsError)  a version number that is already taken
├── AliasConflict      (RuntimeError)     an alias that was moved by someone else
└── StorageFailed      (OSError)          the disk is full, read-only, broken or out of reach
"""

from pathlib import Path


class StoreError(Exception):
    """Say in one sentence what was expected and what came."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class NameInvalid(StoreError, ValueError):
    """A model name, an alias or a reference breaks the rules for names."""

    def __init__(self, text: str, rule: str) -> None:
        super().__init__(f"{text!r} is not valid: {rule}.")
        self.text = text
        self.rule = rule


class ArtifactNotFound(StoreError, KeyError):
    """No such model (`ref` is None), version (an int) or alias (a str) is in the store."""

    def __init__(self, name: str, ref: int | str | None = None, present: str = "") -> None:
        match ref:
            case None:
                message = f"There is no model {name!r} in the store."
            case int():
                message = f"Model {name!r} has no version {ref}; {present}."
            case str():
                message = f"Model {name!r} has no alias {ref!r}; {present}."
        super().__init__(message)
        self.name = name
        self.ref = ref


class ArtifactCorrupt(StoreError, ValueError):
    """A stored file is not what was published; `version` is None for the aliases of a model."""

    def __init__(self, name: str, version: int | None, file: str, expected: str, found: str) -> None:
        subject = f"Model {name!r}" if version is None else f"Model {name!r} version {version}"
        super().__init__(f"{subject} is corrupt: {file!r} should be {expected}, but is {found}.")
        self.name = name
        self.version = version
        self.file = file
        self.expected = expected
        self.found = found


class PayloadRefused(StoreError, ValueError):
    """A folder may not be published; `file` is None when the folder itself is at fault."""

    def __init__(self, folder: Path, file: str | None, reason: str) -> None:
        subject = f"{folder}" if file is None else f"{file!r} in {folder}"
        super().__init__(f"{subject} cannot be published: {reason}.")
        self.folder = folder
        self.file = file
        self.reason = reason


class VersionExists(StoreError, FileExistsError):
    """A version number is already taken, and versions are never overwritten."""

    def __init__(self, name: str, version: int) -> None:
        super().__init__(f"Model {name!r} already has a version {version}, and versions are never overwritten.")
        self.name = name
        self.version = version


class AliasConflict(StoreError, RuntimeError):
    """An alias does not point where the caller believed (None: it does not exist)."""

    def __init__(self, name: str, alias: str, expected: int | None, found: int | None) -> None:
        wanted = "not to exist" if expected is None else f"to point to version {expected}"
        actual = "does not exist" if found is None else f"points to version {found}"
        super().__init__(f"Alias {alias!r} of model {name!r} was expected {wanted}, but it {actual}.")
        self.name = name
        self.alias = alias
        self.expected = expected
        self.found = found


class StorageFailed(StoreError, OSError):
    """The operating system could not read or write; `errno` and `filename` are those of the cause."""

    def __init__(self, attempt: str, cause: OSError) -> None:
        where = f" ({cause.filename})" if cause.filename else ""
        super().__init__(f"{attempt}: {cause.strerror or cause}{where}.")
        self.attempt = attempt
        self.errno = cause.errno
        self.filename = cause.filename
