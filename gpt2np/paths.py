"""Where the files lie that come with the package."""

from __future__ import annotations

from pathlib import Path


def weights_folder() -> Path:
    """The folder with the embedded model and the manifest: in the installed package, or in the clone."""
    installed = Path(__file__).parent / "_weights"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "weights"


def embedded_model_path() -> Path:
    """The embedded model's file, weights/mini/model.onnx."""
    return weights_folder() / "mini" / "model.onnx"


def shown(path: Path) -> Path:
    """The path as reports show it: relative to the current folder where it lies in it."""
    try:
        return path.absolute().relative_to(Path.cwd())
    except (OSError, ValueError):
        return path
