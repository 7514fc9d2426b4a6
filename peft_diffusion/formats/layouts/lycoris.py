"""The names of LyCORIS outside of kohya's trainer, which SimpleTuner writes too: ``lycoris_<path with _ for .>.<suffix>``.

They say no component. LyCORIS itself wraps one model in a file; ComfyUI takes all for the UNet's. Such files are read as
the layout ``kohya`` reads them.
"""

from typing import ClassVar

from ...bases import family as families
from ...core.errors import UserError
from ..layout import Content, Written, WrittenOnly, register
from ..names import LYCORIS, claimants, with_text_model
from . import embedding, kohya


class Lycoris(WrittenOnly):
    """Flat names without a component."""

    name: ClassVar[str] = "lycoris"

    def write(self, content: Content) -> Written:
        """What kohya's layout says too, where the path tells the component."""
        kohya.refuse_own(self.name, content)
        words = embedding.parted(content)[1]
        if words:
            raise UserError(
                f"the layout {self.name!r} has no name for new words, and {words[0].component} carries {words[0].word!r};"
                f" take the layout {kohya.Kohya.name!r}"
            )
        readers = families.find(str(content.spec.base.get("family", ""))).text_encoders
        for component, built in content.adapters.items():
            spelled = with_text_model(component, next(iter(built)))
            one_of_two = len(readers) > 1 and families.role_of(component) == "text encoder"
            if one_of_two or claimants(spelled)[:1] != (component,):
                raise UserError(
                    f"names of the layout {self.name!r} say no component, and {component}.{spelled} would be taken for that"
                    f" of another; take the layout {kohya.Kohya.name!r}, or convert the UNet alone with --component unet"
                )
        return kohya.write(content, lambda component, path: LYCORIS + with_text_model(component, path).replace(".", "_"))


register(Lycoris())
