"""Labelled images from folders, zips and data sets known by name, split to fit, calibrate and test."""

from service.datasets.errors import (
    ClassTooSmall,
    DatasetError,
    DatasetTooLarge,
    ImagesDuplicated,
    ImagesRefused,
    LabelsMismatch,
    NoImages,
    SingleClass,
    SourceUnreadable,
    StrayFiles,
)
from service.datasets.load import Dataset, Split, load_dataset

__all__ = [
    "ClassTooSmall",
    "Dataset",
    "DatasetError",
    "DatasetTooLarge",
    "ImagesDuplicated",
    "ImagesRefused",
    "LabelsMismatch",
    "NoImages",
    "SingleClass",
    "SourceUnreadable",
    "Split",
    "StrayFiles",
    "load_dataset",
]
