"""What the commands on adapter files can be told: flags, TOML keys and Python arguments in one place. Imports no torch."""

from dataclasses import KW_ONLY, field
from functools import cached_property

from ..core.errors import UserError
from ..core.files import at_home
from ..core.settings import COUNT, PARAMETERS, Flag, OnePath, Texts, about, explained, setting, settings_class, settle
from ..formats.layout import SaveDtype, find
from ..formats.planning import Plan, plan


@explained
@settings_class()
class ConvertConfig:
    """What ``convert`` makes of a file.

    Raises:
        UserError: A value is one that cannot be used.
    """

    source: OnePath = field(
        metadata=about("The adapter file.", PARAMETERS, flag=Flag(default_shown=False), place=True),
    )
    output: OnePath = field(
        metadata=about(
            "The file to make; of the layout peft, its folder. An embedding may end in .pt.",
            PARAMETERS,
            flag=Flag(default_shown=False),
            place=True,
        ),
    )
    _: KW_ONLY
    to: str = setting(
        "kohya",
        "The layout: kohya, kohya-sgm (the original's names, as kohya writes for XL), diffusers, peft, lycoris, omi,"
        " embedding (several words in one file), embedding-a1111, embedding-diffusers, or that of a plug-in.",
        PARAMETERS,
    )
    dtype: SaveDtype | None = setting(
        None, "What numbers are rounded to; by default they stay as they are in the file, to the bit.", PARAMETERS
    )
    component: Texts = setting(
        (), "Only this component, such as unet; give it again for more.", PARAMETERS, flag=Flag(default_shown=False)
    )
    to_lora: int | None = setting(
        None,
        "Make a LoRA of this rank of whatever method it is, and tell what that leaves out.",
        PARAMETERS,
        COUNT,
    )
    errors: bool = setting(False, "With --to-lora, show the error of every site.", PARAMETERS)
    base: str | None = setting(
        None,
        "The base that the file is for, where the file does not tell it, or where --to-lora needs its weights: a folder, a"
        " checkpoint, a hub id, or one of sd1, sd2, sdxl, sdxl-refiner, icons.",
        PARAMETERS,
    )
    verify: bool = setting(
        False, "Open what was written as other programs do: how much each reads, how far off its changes are.", PARAMETERS
    )
    partial: bool = setting(False, "Leave out tensors that are not understood, instead of refusing the file.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
        if self.errors and self.to_lora is None:
            raise UserError("--errors is for --to-lora alone")
        source, output = at_home(self.source), at_home(self.output)
        if output.exists() and source.exists() and output.samefile(source):
            raise UserError(f"{output} is the file that is converted; choose another one to write to")

    @cached_property
    def plan(self) -> Plan:
        """The file, parsed once.

        Raises:
            UserError: There is none, or it is no adapter.
        """
        return plan(self.source)

    def check(self) -> None:
        """Find out what can be told without torch.

        Raises:
            UserError: There is no such layout, the file cannot be read, or nothing can be written where it is to be.
        """
        find(self.to)
        _ = self.plan
