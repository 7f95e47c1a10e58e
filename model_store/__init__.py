"""Versioned, checksummed, immutable models in a folder. Speaks directories: no tensors, no HTTP."""

from model_store.errors import (
    AliasConflict,
    ArtifactCorrupt,
    ArtifactNotFound,
    NameInvalid,
    PayloadRefused,
    StorageFailed,
    StoreError,
    VersionExists,
)
from model_store.manifest import (
    AttackRecord,
    DataRecord,
    Draft,
    FalsePositiveRate,
    FileRecord,
    InputSpec,
    Manifest,
    Normalisation,
    Parent,
)
from model_store.storage import LocalStorage, Staging, Storage
from model_store.store import ANY, SERVING, Fetched, Problem, Store, parse_reference

__all__ = [
    "ANY",
    "SERVING",
    "AliasConflict",
    "ArtifactCorrupt",
    "ArtifactNotFound",
    "AttackRecord",
    "DataRecord",
    "Draft",
    "FalsePositiveRate",
    "Fetched",
    "FileRecord",
    "InputSpec",
    "LocalStorage",
    "Manifest",
    "NameInvalid",
    "Normalisation",
    "Parent",
    "PayloadRefused",
    "Problem",
    "Staging",
    "Storage",
    "StorageFailed",
    "Store",
    "StoreError",
    "VersionExists",
    "parse_reference",
]
