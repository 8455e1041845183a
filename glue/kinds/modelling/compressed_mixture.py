"""A mixture stored as a base and changes of it: loaded, it is an ordinary mixture of whole models.

Its model_type is its own, so that whoever cannot put the experts together again refuses the folder instead of filling
them with random numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glue.checkpoint import Checkpoint
from glue.kinds.compressed import Compressed
from glue.kinds.modelling.model_mixture import GlueModelMixtureConfig, GlueModelMixtureForCausalLM


class GlueCompressedMixtureConfig(GlueModelMixtureConfig):
    """The shape of the mixture that the parts make."""

    model_type = "glue_compressed_mixture"
    _auto_class = None  # type: ignore[assignment]  # no code is named in config.json, so plain transformers refuses

    @classmethod
    def of(cls, config: GlueModelMixtureConfig) -> GlueCompressedMixtureConfig:
        """The same shape, stored so."""
        told = config.to_dict()
        return cls(**{key: told[key] for key in told if key not in ("model_type", "auto_map", "transformers_version")})

    def restored(self) -> GlueModelMixtureConfig:
        """The shape of what is loaded."""
        told = self.to_dict()
        return GlueModelMixtureConfig(**{key: told[key] for key in told if key != "model_type"})


class GlueCompressedMixtureForCausalLM(GlueModelMixtureForCausalLM):
    """Loading gives a GlueModelMixtureForCausalLM, which saves itself as what it is then, with dense experts."""

    config_class = GlueCompressedMixtureConfig  # type: ignore[assignment]

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, config: GlueCompressedMixtureConfig,  # type: ignore[override]
                        **how: Any) -> Any:
        """The mixture with its experts dense again."""
        parts = Compressed(Checkpoint(folder), len(config.experts))
        # cloned: experts that share a tensor of the base must not share its memory
        tensors = {name: parts[name].clone() for name in parts}
        return GlueModelMixtureForCausalLM.from_pretrained(
            None, config=config.restored(), state_dict=tensors,
            **{key: value for key, value in how.items() if key not in ("use_safetensors", "local_files_only")})
