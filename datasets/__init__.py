"""COCO, ADE20K and classification data: reading, augmentation, batching, evaluation, pictures, a generated set."""

if __name__ != "swin_dense.datasets":
    raise ImportError(
        "this folder is the package swin_dense.datasets, but it was imported as 'datasets': "
        "run python -P, or start from another folder"
    )
