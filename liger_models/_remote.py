"""What lets a saved folder be loaded where nobody imported this package: a few lines of code, named in config.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedConfig

_MODULE = "modeling_liger"
# An import inside a try is not looked up beforehand, and missing, by transformers: it would advise to install
# a package of the module's name.
_CODE = '''"""A model of liger-linear (pip install liger-linear). After `import liger_models` nothing here is needed."""

try:
    from {module} import {names}
except ImportError as error:
    told = "this model needs liger-linear: run `pip install liger-linear`, then `import liger_models`"
    raise ImportError(f"{{told}} ({{error}})") from error
'''


_Config = PreTrainedConfig if TYPE_CHECKING else object


class PortableConfig(_Config):
    """A config that says in every folder which classes load it, so that trust_remote_code=True finds them.

    Where this package was imported, its classes are registered, and transformers takes them without asking.
    """

    # Names of Auto classes, and of the class in this config's module that each loads.
    auto_classes: ClassVar[dict[str, str]]

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        # A pretrained model may have come with code of its own, which does not go along.
        self.auto_map = {auto: f"{_MODULE}.{name}" for auto, name in self.auto_classes.items()}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        code = _CODE.format(module=type(self).__module__, names=", ".join(self.auto_classes.values()))
        Path(save_directory, f"{_MODULE}.py").write_text(code, encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers calls this for classes that came with a folder, to copy their source into others."""
