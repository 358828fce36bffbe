"""Random valid `.tfg` texts, with odd spacing and comments: they parse, whatever they mean."""

from __future__ import annotations

from hypothesis import strategies as st

NAMES = st.sampled_from(["x", "y", "heads", "d_model", "T", "at", "exact", "_", "std2", "normal"])
NUMBERS = st.sampled_from(["0", "1", "65_536", "0.5", "1e-2", "2.50", "1E3"])
CONSTANTS = st.sampled_from(["true", "false", "none", '"a.*"', r'"q\"\\"', '"# no"'])
SPACE = st.sampled_from(["", " ", " ", "   ", "\t"])
OPERATORS = st.sampled_from(["+", "-", "*", "/", "//", "%", "@", " and ", " or "])
COMPARISONS = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
INSIDE = st.sampled_from(["", "", "", "", "\n", " # inside\n", "\n  # own line\n\n"])
TRAILING = st.sampled_from(["", "", "  # trailing", " #"])
BETWEEN = st.sampled_from(["\n", "\n", "\n\n", "\n\n\n\n", "\n# note\n", "\n\n  # one\n\n\n# two\n\n"])


def expressions() -> st.SearchStrategy[str]:
    """Expressions of every kind, with redundant parentheses, line ends and comments where they may stand."""
    return st.recursive(NAMES | NUMBERS | CONSTANTS, _grow, max_leaves=12)


def _grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    atom = inner.map(lambda text: f"({text})")
    return st.one_of(
        st.builds(lambda a, s, o, t, b: f"({a}){s}{o}{t}({b})", inner, SPACE, OPERATORS, SPACE, inner),
        st.builds(lambda a, o, b: f"{a} {o} {b}", NAMES | atom, OPERATORS, NAMES | atom),
        st.builds(lambda a, o, b: f"({a}) {o} ({b})", inner, COMPARISONS, inner),
        st.builds(lambda a, c, b: f"({a}) if ({c}) else {b}", inner, inner, inner),
        st.builds(lambda s, a: f"{s}({a})", st.sampled_from(["-", "not ", "- -"]), inner),
        atom.map(lambda text: f"{text}.T"),
        st.builds(lambda a, i, p: f"({a})[{p}{i}]", inner, slices(inner), INSIDE),
        st.builds(
            lambda items, p: f"({p}{', '.join(items)},)", st.lists(inner, min_size=1, max_size=3), INSIDE
        ),
        calls(inner),
    )


def slices(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """What stands between the brackets of an index."""
    one = st.one_of(st.just(".."), inner, st.builds(lambda a, b: f"{a} : {b}", inner, inner), st.just(":"))
    return st.lists(one, min_size=1, max_size=3).map(", ".join)


@st.composite
def calls(draw: st.DrawFn, inner: st.SearchStrategy[str]) -> str:
    """`module.f(positional; keyword = value) as label`, sides and keywords in every legal order."""
    positional = draw(st.lists(inner, max_size=3))
    names = draw(st.lists(NAMES, max_size=6, unique=True))
    arguments = positional + [f"{name}{draw(SPACE)}={draw(INSIDE)}{draw(inner)}" for name in names]
    side = draw(st.none() | st.integers(0, len(arguments)))
    text = ""
    for index, argument in enumerate(arguments):
        separator = "" if index == 0 else ","
        text += f"{';' if index == side else separator}{draw(INSIDE)}{argument}{draw(SPACE)}"
    if arguments and side != len(arguments) and draw(st.booleans()):
        text += ","
    function = draw(st.sampled_from(["f", "g", "softmax", "std.attention", "std.linear", "m.f"]))
    label = draw(st.sampled_from(["", "", " as y"]))
    return f"{function}({text}{draw(INSIDE)}){label}"


@st.composite
def statements(draw: st.DrawFn, depth: int = 0) -> str:
    """One statement, compound ones two levels deep."""
    kinds = ["assign", "unpack", "weight", "buffer", "return"] + ["repeat", "if"] * (depth < 2)
    kind, value = draw(st.sampled_from(kinds)), draw(expressions())
    match kind:
        case "assign":
            return f"{draw(NAMES)}{draw(SPACE)}={draw(SPACE)}{value}"
        case "unpack":
            return f"({draw(INSIDE)}{draw(NAMES)}, {draw(NAMES)}{draw(INSIDE)}) = {value}"
        case "weight":
            init = draw(st.just("") | calls(NUMBERS).map(lambda call: f" = {call}"))
            return f"weight w : float[{value}]{init}"
        case "buffer":
            return f"buffer t: int [ ] = {value}"
        case "return":
            return f"return {value}"
        case "repeat":
            return f"repeat i in {value}{draw(bodies(depth + 1))}"
        case _:
            branches = [f"if {value}{draw(bodies(depth + 1))}"]
            for condition in draw(st.lists(expressions(), max_size=2)):
                branches.append(f"if {condition} {draw(bodies(depth + 1))}")
            text = f"{draw(SPACE)}else ".join(branches)
            return text + draw(st.just("") | bodies(depth + 1).map(lambda body: f" else {body}"))


@st.composite
def bodies(draw: st.DrawFn, depth: int = 0) -> str:
    """Braces with statements between them."""
    lines = draw(st.lists(statements(depth), max_size=3))
    text = "".join(f"{line}{draw(TRAILING)}{draw(BETWEEN)}" for line in lines)
    return f" {{{draw(TRAILING)}{draw(BETWEEN)}{text}}}"


@st.composite
def signatures(draw: st.DrawFn) -> str:
    """Parameters on both sides of `;`."""
    tensors = [f"{name}: float[{draw(expressions())}]" for name in draw(st.lists(NAMES, max_size=3))]
    values = [
        f"{name}: {draw(st.sampled_from(['int', 'float?', 'str', 'bool']))}{draw(st.sampled_from(['', ' = none']))}"
        for name in draw(st.lists(NAMES, max_size=4))
    ]
    comma = f",{draw(INSIDE)} "
    right = f"{draw(INSIDE)};{draw(INSIDE)}{comma.join(values)}" if values else ""
    return f"({draw(INSIDE)}{comma.join(tensors)}{right}{draw(INSIDE)})"


@st.composite
def items(draw: st.DrawFn) -> str:
    """One item of a file."""
    name, value = draw(NAMES), draw(expressions())
    match draw(st.sampled_from(["use", "file", "param", "dim", "block", "model", "objective", "budget"])):
        case "use":
            return "use   std"
        case "file":
            return f'use "a b.tfg"  as {name}'
        case "param":
            return f"param {name}{draw(st.sampled_from(['', ': float?', ' :int']))} = {value}"
        case "dim":
            return (
                f"dim {name} <= {draw(NUMBERS)}{draw(st.sampled_from(['', ' %64', ' % 2*heads', '%(8+8)']))}"
            )
        case "objective":
            return f"objective {name}({draw(INSIDE)}x: float[b],y:int[]) = {value}"
        case "budget":
            rule = st.sampled_from(["relative <= 1e-2", "exact", "degree = 4", 'family = "taylor"'])
            entries = [f'at "{name}.*" {one}' for one in draw(st.lists(rule, max_size=2))]
            text = "".join(f"{line}{draw(TRAILING)}{draw(BETWEEN)}" for line in ["output<= 1e-2", *entries])
            return f"budget {name} {{{draw(BETWEEN)}{text}}}"
        case kind:
            results = draw(st.sampled_from(["float[b]", "(float[b], int[])"]))
            return f"{kind} {name}{draw(signatures())} -> {results}{draw(bodies())}"


@st.composite
def programs(draw: st.DrawFn) -> str:
    """A whole file."""
    text = draw(st.sampled_from(["", "# head\n", "\n\n"]))
    for item in draw(st.lists(items(), max_size=3)):
        text += f"{item}{draw(TRAILING)}{draw(BETWEEN)}"
    return text
