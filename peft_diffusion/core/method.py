"""What a method is: frozen hyper-parameters, and every fact about it that others ask for. Imports no torch.

A method is declared once, in its class. Files are read and written, learning rates chosen, words taught and ``inspect`` told
from these declarations: nothing outside of a method's file knows it by name. What it computes at a site is an `Adapter`,
which needs torch; a method that is looked at without torch imports its adapter where it builds one.
"""

import dataclasses
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

from . import plugins
from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from .adapter import Adapter, Described, PairForm, Site

DEFAULT_TARGET = "attention+ff"
"""The target of a method that has none of its own, by its name in ``core.targets``."""

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""The shapes of the tensors of a site, by suffix."""

Scalars: TypeAlias = Mapping[str, float | None]
"""The values of a site's constants that have one element, by suffix; None for others."""

Values: TypeAlias = dict[str, float]
"""Hyper-parameters by name, as tensors tell them; true and false are values too."""

KOHYA, LYCORIS = "networks.lora", "lycoris.kohya"
"""The network modules of kohya's trainer: its own, and that of LyCORIS."""


@dataclass(frozen=True)
class Network:
    """How kohya's trainer, alone or with LyCORIS in it, says what it trained.

    Attributes:
        module: Its network module.
        dim: The rank, where the file tells it.
        alpha: Where the file tells it.
        args: What a person types there as ``--network_args NAME=VALUE``.
    """

    module: str
    dim: int | None = None
    alpha: float | None = None
    args: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates:
    """The learning rates that suit a method where nobody says one.

    The fewer numbers a method trains, and the further they are from the weights, the faster they must move. The factors of
    this package's methods: of three rates for each, about 3 times apart, these had the lowest loss on unseen drawings of a
    style that the embedded base had learned in 150 steps (the measure of scripts/evaluate_styles.py). Rates on text: those
    of small models were found on the embedded one (scripts/compare_text.py); those of large ones are usual in papers.

    Attributes:
        factor: How many times the rate of a component suits it, on pictures.
        own: A rate of its own on pictures, whatever the component's; None for the component's.
        own_small: The same on a small base; None for ``own``.
        text: A rate of its own on text; None for the usual one of language models.
        text_small: The same on a small language model; None for the usual one of small models.
    """

    factor: float = 1.0
    own: float | None = None
    own_small: float | None = None
    text: float | None = None
    text_small: float | None = None

    def on_pictures(self, component: float, *, small: bool) -> float:
        """Choose a rate for a training on pictures.

        Args:
            component: The usual rate of the component that is trained.
            small: Whether the base is a small one.

        Returns:
            The learning rate.
        """
        own = self.own_small if small and self.own_small is not None else self.own
        return component * self.factor if own is None else own

    def on_text(self, usual: float, *, small: bool) -> float:
        """Choose a rate for a training on text.

        Args:
            usual: The usual rate of models of that size.
            small: Whether the model is a small one.

        Returns:
            The learning rate.
        """
        own = self.text_small if small else self.text
        return usual if own is None else own


@dataclass(frozen=True)
class PeftSite:
    """What peft keeps for one site.

    Attributes:
        tensors: By what stands behind the path in the names of its files.
        rank: ``r`` of this site.
        alpha: The change of this site is multiplied with alpha / rank.
    """

    tensors: Mapping[str, "Tensor"]
    rank: int
    alpha: float


@dataclass(frozen=True)
class PeftForm:
    """How peft keeps an adapter.

    Attributes:
        kind: ``peft_type`` of its configuration.
        alpha: What its configuration calls alpha; "" where it has neither rank nor alpha.
        sites: By path.
        options: Further entries of its configuration, the same for all sites.
    """

    kind: str
    alpha: str
    sites: Mapping[str, PeftSite]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VirtualRows:
    """Which columns of the virtual tokens that peft keeps, (tokens, width), are which tensor of a method.

    Attributes:
        layer: The number of the attention that they are of; None for the token embedding.
        suffix: What the method calls the tensor.
        columns: The first column, and the one behind the last.
        constants: Numbers that belong beside them, by suffix.
        words: The suffix of the tokens that they began as; "" where they began as none.
    """

    layer: int | None
    suffix: str
    columns: tuple[int, int]
    constants: Mapping[str, float] = field(default_factory=dict)
    words: str = ""


METHODS: dict[str, type["Method"]] = {}
"""Every method that was imported, by its name. ``methods.known()`` imports those that there are."""


@dataclass(frozen=True)
class Method:
    """Frozen hyper-parameters that can build an adapter for a site. A subclass gives its name and is found by it.

    A subclass has to say what ``recognizes``, ``serves``, ``build`` and ``read`` do. All else that it may declare has a
    default, which suits a method that no other program knows.

    Attributes:
        name: What a person calls it.
        suffixes: The names of its tensors at a site in a file: see ``Adapter.state``.
        target: Where it sits, unless one says, by a name of ``core.targets``.
        constants: Those of the suffixes that hold no parameters but scales, marks or text.
        fillers: Those of the suffixes that our own files hold for other programs alone, and that change nothing.
        ranked: Those of the suffixes whose first size is the rank.
        by_output: Those of the suffixes whose first size is the number of outputs. A method that names them can be read from
            a file that has several layers in one, such as queries, keys and values.
        rows: The suffixes of its two tensors (n, width) and (rows of the weight, n) of which the product is the change of
            the weight, where it can say a change of n rows so; None where it cannot.
        whole: The suffixes of whole changes of weight and bias, where it can say such; None where it cannot.
        aliases: What diffusers, peft and ComfyUI call its tensors after the path of the site, without a last ``.weight`` or
            ``.default``, and the suffix that each means.
        replacing: Those of the aliases under which a file holds a weight itself and not its change.
        embedding: The suffixes of its vectors and of its words, where other programs know its files as embeddings of new
            words (textual inversion); None for any other method.
        rates: The learning rates that suit it.
        decayed: Whether weight decay pulls its parameters towards 0, which has to be where they change nothing.
        reads_words: Whether it is for components alone that read words, which it then adapts unless others are named.
        debiased_when_small: Whether, alone on a small base, it learns with timesteps weighed: see ``--debiased``.
    """

    name: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]
    target: ClassVar[str] = DEFAULT_TARGET
    constants: ClassVar[frozenset[str]] = frozenset()
    fillers: ClassVar[frozenset[str]] = frozenset()
    ranked: ClassVar[frozenset[str]] = frozenset()
    by_output: ClassVar[frozenset[str]] = frozenset()
    rows: ClassVar[tuple[str, str] | None] = None
    whole: ClassVar[tuple[str, str] | None] = None
    aliases: ClassVar[Mapping[str, str]] = {}
    replacing: ClassVar[frozenset[str]] = frozenset()
    embedding: ClassVar[tuple[str, str] | None] = None
    rates: ClassVar[Rates] = Rates()
    decayed: ClassVar[bool] = True
    reads_words: ClassVar[bool] = False
    debiased_when_small: ClassVar[bool] = False

    def __init_subclass__(cls, *, name: str, suffixes: frozenset[str] = frozenset()) -> None:
        """Register the method.

        Raises:
            UserError: Another module has a method of that name.
        """
        super().__init_subclass__()
        other = METHODS.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserError(f"there is a method {name!r} already, of {other.__module__}; give this one another name")
        cls.name = name
        cls.suffixes = suffixes
        METHODS[name] = cls

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """Tell whether tensors of one site are this method's, and no other's; others' may stand beside them.

        Args:
            suffixes: The names of the tensors.

        Returns:
            Whether ``read`` can make an adapter of them.

        Raises:
            NotImplementedError: The method does not say.
        """
        raise NotImplementedError

    @classmethod
    def needed(cls, suffixes: Set[str]) -> Sequence[str]:
        """Name the tensors without which ``read`` can make nothing of a site, whatever the site is.

        Args:
            suffixes: The names of the tensors that there are, which `recognizes` knows.

        Returns:
            Their names; those of them that are not there make the file damaged.
        """
        return ()

    @classmethod
    def missing(cls, suffixes: Set[str]) -> str | None:
        """Name the first tensor that is not there and has to be.

        Args:
            suffixes: The names of those that there are.

        Returns:
            Its name; None where none is missing.
        """
        return next((name for name in cls.needed(suffixes) if name not in suffixes), None)

    def serves(self, site: "Site") -> bool:
        """Tell whether this method has something to add at a module.

        Args:
            site: A module of a base.

        Returns:
            Whether ``build`` can make an adapter for it.

        Raises:
            NotImplementedError: The method does not say.
        """
        raise NotImplementedError

    def build(self, site: "Site") -> "Adapter":
        """Make a fresh adapter, one that leaves the output as it is.

        Args:
            site: The module that it will sit on.

        Returns:
            The adapter.

        Raises:
            NotImplementedError: The method does not say.
        """
        raise NotImplementedError

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "Adapter":
        """Make the adapter that ``state()`` of an adapter gave.

        Args:
            site: The module that it will sit on.
            tensors: Those of the site, by suffix.

        Returns:
            The adapter.

        Raises:
            UserError: The tensors do not fit the site; its path is not in the message.
            NotImplementedError: The method does not say.
        """
        raise NotImplementedError

    @classmethod
    def stored(cls, site: "Site", tensors: "Mapping[str, Described]", constants: Mapping[str, float]) -> "PairForm | None":
        """Say how a file holds what it has for a site, where that is a pair of low rank and nothing else.

        Args:
            site: The module that it will sit on.
            tensors: What the header tells of those of the site, by suffix.
            constants: Numbers that belong beside them, by suffix.

        Returns:
            The form of the pair, whose ``build`` makes what ``read`` would; None where ``read`` is to be asked.
        """
        return None

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """Tell the hyper-parameters from the header of a file.

        Args:
            shapes: Of the tensors of one site. They may be damaged: what has no sensible shape tells nothing.
            scalars: The values of the constants among them.

        Returns:
            Those hyper-parameters that the tensors tell; None where they are not this method's.
        """
        return {} if cls.recognizes(shapes.keys()) else None

    @classmethod
    def weight_shape(cls, shapes: Shapes) -> tuple[int, ...]:
        """Tell the shape of the weight that is changed from those of a site's tensors.

        Args:
            shapes: Of the tensors of one site.

        Returns:
            (out, in, ...); () where they do not tell.
        """
        return ()

    @classmethod
    def network(cls, values: Mapping[str, Any]) -> Network | None:
        """Say in the words of kohya's trainer how this method was trained.

        Args:
            values: The hyper-parameters, as ``spec()`` gives them.

        Returns:
            The network; None for a method that neither that trainer nor LyCORIS has.
        """
        return None

    @classmethod
    def from_alias(cls, alias: str, tensor: "Tensor") -> "Tensor":
        """Bring a tensor of another program to the shape that this method's files have.

        Args:
            alias: What the program calls it, one of ``aliases``.
            tensor: The tensor.

        Returns:
            The tensor in our shape.
        """
        return tensor

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str, shapes: Shapes) -> Mapping[str, float]:
        """Tell what the configuration of peft, and no tensor, says of a site.

        Args:
            config: The configuration; nothing where it is not there.
            path: Of the module in its component.
            shapes: Of the tensors of the site, by suffix, as they are in the file.

        Returns:
            Numbers by suffix.
        """
        return {}

    @classmethod
    def from_virtual_tokens(cls, kind: str, width: int, layers: int) -> Sequence[VirtualRows]:
        """Tell how this method says the virtual tokens of peft.

        Args:
            kind: ``peft_type`` of their configuration.
            width: Numbers of each token in the file.
            layers: Attentions of the model, as the configuration says; 0 where it does not.

        Returns:
            Its tensors; none where they are another method's.
        """
        return ()

    @classmethod
    def scaled_tensor(cls, suffixes: Set[str]) -> str | None:
        """Name the tensor that takes in the scale of a program which scales where a file of ours knows no scale.

        Args:
            suffixes: Of the tensors of one site.

        Returns:
            The suffix; None where ``alpha`` says the scale.
        """
        return None

    @classmethod
    def in_peft(cls, adapters: Mapping[str, "Adapter"]) -> PeftForm | None:
        """Bring adapters of this method into the form that peft keeps them in.

        Args:
            adapters: By path. They are attached.

        Returns:
            The form; None where peft does not have this method, or has it with another mathematics.

        Raises:
            UserError: peft has the method, and not what these adapters are.
        """
        return None

    def dropped(self) -> float:
        """The share of a site's inputs, 0 to below 1, that it does not see in a step of training."""
        return 0.0

    def new_words(self) -> Sequence[str]:
        """The words that it teaches the tokenizer of its component."""
        return ()

    def initial_words(self) -> Sequence[tuple[str, int]]:
        """Words that its vectors have yet to begin as, each with the number of vectors, in the order of those."""
        return ()

    def with_ids(self, ids: Sequence[int]) -> Self:
        """Say which tokens the vectors begin as: see ``initial_words``.

        Args:
            ids: One a vector.

        Returns:
            The method with them.
        """
        return self

    @classmethod
    def plugin(cls) -> str | None:
        """The module that it comes from, for ``--plugin``; None for a method of this package."""
        return plugins.origin(cls.__module__)

    def spec(self) -> dict[str, Any]:
        """Name and hyper-parameters as JSON values, and the plug-in that it comes from, if it does."""
        plugin = self.plugin()
        return {"method": self.name, **({"plugin": plugin} if plugin else {}), **dataclasses.asdict(self)}
