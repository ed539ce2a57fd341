"""A strict reader of #PBS lines, after OpenPBS's qsub: what it refuses, or misreads.

Debian's qsub for Slurm forgives much; this does not. `problems(script)` names the lines that
OpenPBS would not read as they are meant.
"""

import re

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]{0,229}")
RESOURCE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
VALUE = re.compile(r"[^\s:+,=\"']+")
WALLTIME = re.compile(r"(\d+:)?(\d+:)?\d+")
PLACE = re.compile(
    r"(free|pack|scatter|vscatter)(:(excl|exclhost|shared))?(:group=[A-Za-z]\w*)?|(excl|exclhost|shared)"
)
PATH = re.compile(r"([\w.-]+:)?/?[^\s:]+")


def problems(script):
    """What is wrong with the directives of a job script, as a list of sentences."""
    out, lines = [], script.splitlines()
    if not lines or not re.fullmatch(r"#!\s*/\S+( \S+)?", lines[0]):
        out.append("line 1: no interpreter")
    places = [i for i, line in enumerate(lines) if line.startswith("#PBS")]
    if not places:
        return [*out, "no #PBS line"]
    # Directives end at the first line that is neither a comment nor empty; a comment between two of
    # them is allowed by some versions only.
    for i in range(places[0], places[-1]):
        if i not in places:
            out.append(f"line {i + 1}: not a directive, between directives")
    for i in range(1, places[0]):
        if lines[i].strip() and not lines[i].startswith("#"):
            out.append(f"line {i + 1}: a command before the directives, which are then ignored")
    for i in places:
        match = re.fullmatch(r"#PBS (-[A-Za-z])( (\S.*))?", lines[i])
        if not match:
            out.append(f"line {i + 1}: not '#PBS -x value': {lines[i]!r}")
        elif complaint := _option(match[1], match[3]):
            out.append(f"line {i + 1}: {complaint}: {lines[i]!r}")
    return out


def _option(option, value):
    if option == "-V":
        return "takes no value" if value else None
    if value is None or value != value.strip():
        return "needs one value, without blanks around it"
    rules = {
        "-N": lambda: NAME.fullmatch(value),
        "-l": lambda: not _resources(value),
        "-q": lambda: re.fullmatch(r"[A-Za-z][\w.-]*(@[\w.-]+)?", value),
        "-A": lambda: re.fullmatch(r"\S+", value),
        "-P": lambda: re.fullmatch(r"\S+", value),
        "-j": lambda: value in ("oe", "eo", "n"),
        "-r": lambda: value in ("y", "n"),
        "-k": lambda: re.fullmatch(r"[oed]{1,3}|n", value),
        "-o": lambda: PATH.fullmatch(value),
        "-e": lambda: PATH.fullmatch(value),
        "-m": lambda: re.fullmatch(r"n|[abej]+", value),
        "-M": lambda: re.fullmatch(r"[^\s,]+(,[^\s,]+)*", value),
        "-J": lambda: re.fullmatch(r"\d+-\d+(:\d+)?(%\d+)?", value),
        "-W": lambda: re.fullmatch(r"[a-z_]+=\S+", value),
        "-v": lambda: re.fullmatch(r"\w+(=[^\s,]*)?(,\w+(=[^\s,]*)?)*", value),
    }
    if option not in rules:
        return "no such option"
    if not rules[option]():
        return _resources(value) if option == "-l" else "not a value of this option"
    return None


def _resources(value):
    """What is wrong with the value of -l, or None."""
    if " " in value:
        return "blanks in a resource list"
    name, sign, asked = value.partition("=")
    if not sign or not RESOURCE.fullmatch(name) or not asked:
        return "not name=value"
    if name == "select":
        return _select(asked)
    if name == "place":
        return None if PLACE.fullmatch(asked) else "no such placement"
    if name == "walltime":
        parts = asked.split(":")
        good = WALLTIME.fullmatch(asked) and all(int(p) < 60 for p in parts[1:])
        return None if good and any(int(p) for p in parts) else "not [[hours:]minutes:]seconds"
    if name in ("nodes", "ncpus", "mem"):
        return "old form, not to be mixed with select"
    good = re.fullmatch(r"[^\s,=]+(,[A-Za-z]\w*=[^\s,=]+)*", asked)
    return None if good else "not a list of name=value"


def _select(asked):
    for chunk in asked.split("+"):
        parts = chunk.split(":")
        if parts[0].isdigit():
            if int(parts[0]) < 1:
                return "a chunk of no nodes"
            parts = parts[1:]
        seen = set()
        for part in parts:
            name, sign, value = part.partition("=")
            if not sign or not RESOURCE.fullmatch(name) or not VALUE.fullmatch(value):
                return f"{part!r} in select is not resource=value"
            if name in ("walltime", "place", "filesystems"):
                return f"{name} belongs to the job, not to a chunk"
            if name in ("ncpus", "mpiprocs", "ngpus", "ompthreads") and not value.isdigit():
                return f"{name} needs a number"
            if name in seen:
                return f"{name} twice in a chunk"
            seen.add(name)
    return None
