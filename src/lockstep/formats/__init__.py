"""Model containers on disk: GGUF files and Hugging Face directories, Hub ids and the embedded model.

Owns: headers, metadata, the tensor index, canonical tensor names, what a config.json would say.
Must not know: torch, nor any tensor's values. Read first: `model_files.py`, then `locate.py`.
"""

from lockstep.formats.locate import embedded_model_path, open_model
from lockstep.formats.model_files import ModelFiles, TensorInfo

__all__ = ["ModelFiles", "TensorInfo", "embedded_model_path", "open_model"]
