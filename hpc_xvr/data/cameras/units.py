"""Units that camera files state beside their numbers."""

from __future__ import annotations

import re

_PREFIXES = {
    "": 1.0,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "c": 1e-2,
    "m": 1e-3,
    "u": 1e-6,
    "n": 1e-9,
    "p": 1e-12,
}
_WORDS = {
    **dict.fromkeys(("sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("msec", "millisecond", "milliseconds"), "ms"),
    **dict.fromkeys(("usec", "microsecond", "microseconds"), "us"),
    **dict.fromkeys(("nsec", "nanosecond", "nanoseconds"), "ns"),
    **dict.fromkeys(("minute", "minutes"), "min"),
    **dict.fromkeys(("hour", "hours"), "h"),
    **dict.fromkeys(("inch", "inches"), "in"),
    **dict.fromkeys(("hz", "hertz", "fps", "1/s", "s-1", "s^-1", "1/sec", "1/second"), "Hz"),
    **dict.fromkeys(("frames/s", "frames/sec", "frames/second", "frames per second"), "Hz"),
    **dict.fromkeys(("khz", "kilohertz"), "kHz"),
    **dict.fromkeys(("megahertz",), "MHz"),
    **dict.fromkeys(("meter", "meters", "metre", "metres"), "m"),
    **dict.fromkeys(("millimeter", "millimeters", "millimetre", "millimetres"), "mm"),
    **dict.fromkeys(("micron", "microns", "micrometer", "micrometers"), "um"),
    **dict.fromkeys(("micrometre", "micrometres"), "um"),
    **dict.fromkeys(("nanometer", "nanometers", "nanometre", "nanometres"), "nm"),
}


_OTHERS = {("min", "s"): 60.0, ("h", "s"): 3600.0, ("in", "um"): 25_400.0}


def factor(unit: str, of: str) -> float | None:
    """What a number in `unit` is multiplied by to be in `of`: s, Hz or um; None: not such a unit.

    "per pixel" is passed over. Prefixes are case-sensitive, as MHz and mHz are not the same.
    """
    text = " ".join(
        unit.replace("\N{MICRO SIGN}", "u").replace("\N{GREEK SMALL LETTER MU}", "u").split()
    )
    text = re.sub(r" ?(/|per) ?(pixel|px)$", "", text, flags=re.IGNORECASE)
    text = _WORDS.get(text.lower(), text)
    if (text, of) in _OTHERS:
        return _OTHERS[text, of]
    base = {"s": "s", "Hz": "Hz", "um": "m"}[of]
    if not text.endswith(base) or (prefix := text[: -len(base)]) not in _PREFIXES:
        return None
    return _PREFIXES[prefix] / (1e-6 if of == "um" else 1.0)
