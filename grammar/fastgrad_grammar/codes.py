"""Every diagnostic code and its title; docs/errors.md has one section for each."""

from __future__ import annotations

CODES: dict[str, str] = {
    # FG0xx: files and the command line
    "FG001": "file cannot be read",
    "FG002": "file is not UTF-8 text",
    "FG003": "file is too large",
    # FG1xx: syntax
    "FG101": "unexpected token",
    "FG102": "bracket is never closed",
    "FG103": "closing bracket without its opening one",
    "FG104": "character that the language does not use",
    "FG105": "string is never closed",
    "FG106": "nested too deeply",
    "FG107": "keyword used as a name",
    "FG108": "`=` and `==` confused",
    "FG109": "parameter on the wrong side of `;`",
    "FG110": "unknown type",
    "FG111": "declaration or statement in the wrong place",
    "FG112": "positional argument behind a keyword argument",
    "FG113": "argument given twice",
    "FG114": "initialiser is not a call",
    "FG115": "chained comparison",
    "FG116": "result type is missing",
    "FG117": "unknown attribute",
    "FG118": "spelling of another language",
    "FG119": "unknown escape in a string",
    "FG120": "malformed number",
    "FG121": "statement without an effect",
    "FG122": "`use` of a file without a name",
    # FG2xx: names, values, shapes
    "FG201": "unknown name",
    "FG204": "matrix product of shapes that do not fit",
    # FG3xx: bounds and budgets
    "FG301": "attention without a proved bound",
    "FG302": "budget pattern that matches no attention",
    "FG303": "budget value out of range",
    "FG304": "polynomial that is not positive on the logits' range",
    "FG305": "pinned degree that misses its limit",
    "FG306": "logits' range too wide for the polynomial",
    "FG307": "rank over the limit",
    "FG308": "near field that cannot be set",
    "FG309": "mask that no polynomial serves",
    "FG310": "no polynomial meets the limits",
    # FG4xx: values from outside, files of a run
    "FG411": "text cannot be read",
    "FG412": "text is too short",
    "FG413": "checkpoint cannot be read",
    "FG414": "checkpoint of another run",
    "FG415": "model that is no byte-level language model",
    "FG416": "malformed or unknown option value",
    "FG417": "unknown pass",
    "FG418": "weights that cannot be used",
    "FG419": "folder that is no compiled model",
    "FG420": "target that is not available",
}
