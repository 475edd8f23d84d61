"""What templates of Wikipedia show, by kind: numbers with units, dates, names of ships, formulas, quotations, lists."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

FRACTION = "\x05"
"""In front of a fraction: a blank if a digit stands before it, since 1{{frac|1|4}} is not 11/4."""

_NUMBER = re.compile(r"\A[-+−±~]?[.]?\d[\d.,/+ ]*+(?:[eE][+-]?\d{1,3})?(?:\(\d{1,9}\))?$")
_HOLES = re.compile("\x01[^\x01\x02]*+\x02")
_POWER = re.compile(r"(?<=[A-Za-z])([23])(?![\w])")


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments of a template: `positional` from 1 on, `named` by lower-case name."""

    positional: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)

    def at(self, number: int) -> str:
        """The positional argument of that number, or nothing."""
        return self.positional[number - 1] if number <= len(self.positional) else ""

    def first_of(self, *names: str) -> str:
        """The first argument of these names that is not empty; a digit is a position."""
        for name in names:
            if value := self.at(int(name)) if name.isdigit() else self.named.get(name, ""):
                return value
        return ""


Renderer: TypeAlias = Callable[[Arguments], str | None]


def constant(text: str) -> Renderer:
    """Shows always the same."""
    return lambda arguments: text


def argument(*names: str, before: str = "", after: str = "") -> Renderer:
    """Shows the first argument of these names that is not empty, between `before` and `after`; None if there is none."""

    def render(arguments: Arguments) -> str | None:
        value = arguments.first_of(*names)
        return f"{before}{value}{after}" if value else ("" if before or after else value)

    return render


def last(arguments: Arguments) -> str:
    """Shows the last positional argument."""
    filled = [value for value in arguments.positional if value]
    return filled[-1] if filled else arguments.first_of("text", "quote", "texte")


def joined(separator: str = "") -> Renderer:
    """Shows all positional arguments."""
    return lambda arguments: separator.join(value for value in arguments.positional if value)


def lines(arguments: Arguments) -> str:
    """Each positional argument on a line of its own."""
    return "\n" + "\n".join(value for value in arguments.positional if value) + "\n"


def block(*names: str) -> Renderer:
    """A text on lines of its own, such as a quotation; who said it follows on the next one."""

    def render(arguments: Arguments) -> str:
        text = arguments.first_of(*names)
        named = ("author", "autor", "auteur", "autore", "автор", "sign", "by", "source", "quelle", "fonte", "fuente")
        told = [arguments.named[name] for name in named if arguments.named.get(name)]
        if not told and text == arguments.at(1):
            told = [value for value in arguments.positional[1:3] if value]
        return f"\n{text}\n" + (f"— {', '.join(told)}\n" if told and text else "")

    return render


# ---- numbers and units


def plain(text: str) -> str:
    """A text without the holes of templates inside it."""
    return _HOLES.sub("", text).replace("&nbsp;", " ").strip()


def is_number(text: str) -> bool:
    """Whether a text is a number as people write it."""
    return _NUMBER.match(text) is not None


def unit_of(code: str) -> str:
    """The symbol of a unit code of {{convert}}; a code that is not known shows as it is, with raised exponents."""
    code = plain(code)
    if code in UNITS:
        return UNITS[code]
    if match := re.match(r"e(3|6|9|12)([A-Za-z].*)", code):
        return f"{_POWERS[match[1]]} {unit_of(match[2])}"
    if match := re.fullmatch(r"([kMG]?)oilbbl(/[a-z]+)?", code):
        return f"{_POWERS.get(match[1], '')} barrels{match[2] or ''}".strip()
    return _POWER.sub(lambda match: "²³"[int(match[1]) - 2], code)


_POWERS = {"3": "thousand", "6": "million", "9": "billion", "12": "trillion", "k": "thousand", "M": "million", "G": "billion"}
UNITS = {
    "sqmi": "sq mi", "mi2": "sq mi", "sqft": "sq ft", "ft2": "sq ft", "sqin": "sq in", "in2": "sq in", "sqyd": "sq yd",
    "yd2": "sq yd", "sqkm": "km²", "sqm": "m²", "cuft": "cu ft", "ft3": "cu ft", "cuin": "cu in", "in3": "cu in",
    "cumi": "cu mi", "cuyd": "cu yd", "yd3": "cu yd", "C": "°C", "F": "°F", "R": "°R", "C-change": "°C", "F-change": "°F",
    "acre": "acres", "carat": "carats", "foot": "ft", "feet": "ft", "inch": "in", "inches": "in", "mile": "mi",
    "miles": "mi", "lbs": "lb", "USgal": "US gal", "impgal": "imp gal", "U.S.gal": "US gal", "usgal": "US gal",
    "USoz": "US fl oz", "impoz": "imp fl oz", "USfloz": "US fl oz", "impfloz": "imp fl oz", "LT": "long tons",
    "ST": "short tons", "MT": "t", "tonne": "t", "tonnes": "t", "LTf": "long tons-force", "knot": "kn", "knots": "kn",
    "mi/h": "mph", "kph": "km/h", "NM": "nmi", "ftin": "ft in", "stlb": "st lb", "um": "µm", "lb/ft3": "lb/cu ft",
    "PD/sqmi": "/sq mi", "PD/km2": "/km²", "/sqmi": "/sq mi", "/km2": "/km²", "l": "L", "m.": "m", "ha.": "ha",
    "mpgus": "mpg‑US", "mpgimp": "mpg‑imp", "km2": "km²", "m2": "m²", "cm2": "cm²", "mm2": "mm²", "km3": "km³", "m3": "m³",
    "cm3": "cm³", "dm3": "dm³", "kg/m3": "kg/m³", "g/cm3": "g/cm³", "g/m3": "g/m³", "cuft/s": "cu ft/s", "m3/s": "m³/s",
    "ft·lbf": "ft⋅lbf", "ftlbf": "ft⋅lbf", "lbft": "lb⋅ft", "lb-ft": "lb⋅ft", "Nm": "N⋅m", "kt": "kn", "chain": "chains",
    "furlong": "furlongs", "fathom": "fathoms",
}  # fmt: skip

_BETWEEN_NUMBERS = {
    "-": "–", "–": "–", "to": " to ", "to(-)": " to ", "and": " and ", "or": " or ", "by": " by ", "x": " × ", "×": " × ",
    "+/-": " ± ", "±": " ± ", "to about": " to about ", "and(-)": " and ", "xx": " × ", "*": " × ", "/": "/", "+": " + ",
    ",": ", ", ", and": ", and ", ", or": ", or ", "a": " a ", "à": " à ", "bis": " bis ", "y": " y ", "e": " e ",
}  # fmt: skip


def converted(arguments: Arguments) -> str:
    """{{convert|5|to|10|km|mi}} reads "5 to 10 km", {{convert|5|ft|11|in|m}} reads "5 ft 11 in"."""
    rest = [plain(value) for value in arguments.positional]
    if not rest:
        return ""
    text, rest = quantity(rest[0]), rest[1:]
    while len(rest) >= 2 and rest[0] in _BETWEEN_NUMBERS and is_number(rest[1]):
        text, rest = text + _BETWEEN_NUMBERS[rest[0]] + quantity(rest[1]), rest[2:]
    if rest and rest[0] and not is_number(rest[0]):
        as_adjective = arguments.named.get("adj") == "on" and len(rest[0]) > 2 and rest[0].isalpha()
        unit, rest = unit_of(rest[0]), rest[1:]
        text = f"{text}-{unit.removesuffix('s')}" if as_adjective else _with_unit(text, unit)
        while len(rest) >= 2 and is_number(rest[0]) and rest[1] and rest[1][0].isalpha():
            if rest[1] in _BETWEEN_NUMBERS or rest[1].isdigit():
                break
            text, rest = f"{text} {quantity(rest[0])} {unit_of(rest[1])}", rest[2:]
    return text


def _with_unit(number: str, unit: str) -> str:
    return f"{number}{unit}" if unit.startswith("/") else f"{number} {unit}"


def quantity(number: str) -> str:
    """A number as people write it: 1+1/2 is "1 1/2", 1.5e6 is "1.5×10^6"."""
    if match := re.fullmatch(r"(\d+)\+(\d+/+\d+)", number):
        return f"{match[1]} {match[2].replace('//', '/')}"
    if match := re.fullmatch(r"([-+−]?[\d.,]+)[eE]\+?(-?\d{1,3})", number):
        return f"{match[1]}×10^{match[2].replace('-', '−')}"
    return number


def value(arguments: Arguments) -> str:
    """{{val|1.5|0.2|e=30|u=kg}} of en, and its kin elsewhere, reads "(1.5±0.2)×10^30 kg"."""
    numbers = [plain(item) for item in arguments.positional]
    text = numbers[0] if numbers else ""
    extra = [item for item in numbers[1:] if item]
    if len(extra) == 1:
        text = f"{text}{extra[0]}" if extra[0].startswith("(") else f"{text}±{extra[0].lstrip('±')}"
    elif len(extra) >= 2:
        text = f"{text} +{extra[0].lstrip('+')} −{extra[1].lstrip('-−')}"
    named = arguments.named
    power = named.get("e") or named.get("10^") or ""
    if power:
        text = f"({text})" if "±" in text else text
        text = f"{text}×10^{plain(power).replace('-', '−')}" if text else f"10^{plain(power).replace('-', '−')}"
    below = arguments.first_of("up", "upl")
    unit = plain(arguments.first_of("u", "ul", "unit", "unità", "unidad")) + (f"/{plain(below)}" if below else "")
    unit = re.sub(r"(?<=[A-Za-z])\^?(-?[23])(?!\d)", lambda m: {"2": "²", "3": "³"}.get(m[1], f"^{m[1]}"), unit)
    text = f"{named.get('p', '')}{text}" + (f" {unit}" if unit and unit not in "%°" else unit)
    return text + named.get("s", "") + named.get("end", "")


def fraction(arguments: Arguments) -> str:
    """{{frac|3|1|2}} reads "3 1/2", {{frac|2}} reads "1/2", {{sfrac|n + 1|2}} reads "(n + 1)/2"."""
    numbers = [plain(item) for item in arguments.positional if item]
    if not numbers:
        return ""
    whole, (above, below) = numbers[:-2], numbers[-2:] if len(numbers) > 1 else ("1", numbers[0])
    above, below = (f"({part})" if " " in part or "+" in part else part for part in (above, below))
    return FRACTION + " ".join([*whole, f"{above}/{below}"])


def unit_french(arguments: Arguments) -> str:
    """{{unité|5|km|2}} of fr reads "5 km²", {{unité|3|m|s|-1}} reads "3 m s^-1"; also {{unité|5 km}}."""
    named = arguments.named
    text, rest = plain(arguments.at(1)), [plain(item) for item in arguments.positional[1:]]
    for word in ("à", "et", "ou", "/", "+", "-", "×"):
        if named.get(word):
            text += f" {word} {plain(named[word])}"
    if named.get("±"):
        text += f" ± {plain(named['±'])}"
    if power := arguments.first_of("e", "exp", "10exp"):
        text += f"×10^{plain(power)}"
    while rest:
        unit, rest = rest[0], rest[1:]
        if rest and re.fullmatch(r"[-+−]?\d+", rest[0]):
            unit, rest = unit + {"2": "²", "3": "³", "1": ""}.get(rest[0], f"^{rest[0]}"), rest[1:]
        text += f" {unit}" if unit else ""
    return text


def height(arguments: Arguments) -> str:
    """{{height|ft=5|in=11}} reads "5 ft 11 in", {{height|m=1.80}} reads "1.80 m"."""
    shown = [f"{plain(arguments.named[unit])} {unit}" for unit in ("m", "cm", "ft", "in", "hand") if arguments.named.get(unit)]
    return " ".join(shown) or plain(arguments.at(1))


def money(symbol: str) -> Renderer:
    """{{US$|5 million}} reads "US$5 million"; without an amount only the sign."""
    return lambda arguments: symbol + plain(arguments.first_of("1", "amount", "value"))


def currency(arguments: Arguments) -> str:
    """{{currency|100|USD}}."""
    code = plain(arguments.at(2)).upper() or "USD"
    return f"{CURRENCIES.get(code, code + ' ')}{plain(arguments.at(1))}"


CURRENCIES = {
    "USD": "US$", "US$": "US$", "AUD": "A$", "CAD": "C$", "NZD": "NZ$", "HKD": "HK$", "SGD": "S$", "NTD": "NT$",
    "TWD": "NT$", "EUR": "€", "GBP": "£", "JPY": "¥", "CNY": "¥", "RMB": "CN¥", "INR": "₹", "KRW": "₩", "PHP": "₱",
    "RUB": "₽", "BRL": "R$", "ILS": "₪", "NIS": "₪", "TRY": "₺", "UAH": "₴", "THB": "฿", "VND": "₫", "NGN": "₦",
    "MXN": "Mex$", "ZAR": "R", "CHF": "CHF ", "SEK": "SEK ", "NOK": "NOK ", "DKK": "DKK ", "PLN": "PLN ", "PKR": "Rs ",
    "BDT": "৳", "IDR": "Rp", "MYR": "RM", "ARS": "AR$",
}  # fmt: skip


def raised(prefix: str = "×10") -> Renderer:
    """{{e|6}} reads "×10^6"."""
    return lambda arguments: f"{prefix}<sup>{arguments.at(1)}</sup>" if arguments.at(1) else prefix


def element(arguments: Arguments) -> str:
    """{{chem|SO|4|2-}}: names and numbers in turn; an argument with a sign is the charge."""
    text = ""
    for item in arguments.positional:
        item = plain(item)
        charge = item[-1:] in "+-−" and bool(item)
        text += f"<sup>{item}</sup>" if charge else item
    return text


def nuclide(arguments: Arguments) -> str:
    """{{nuclide|U|235}} and {{simplenuclide|uranium|235}}: "²³⁵U" in plain text is "U-235"."""
    mass = plain(arguments.first_of("2", "mass"))
    return plain(arguments.at(1)) + (f"-{mass}" if mass else "")


def angle(text: str) -> Renderer:
    """A character before and after the first argument."""
    return lambda arguments: text[0] + arguments.first_of("1", "text") + text[-1]


def coordinates(arguments: Arguments) -> str | None:
    """{{coord|51|30|N|0|7|W}} in a sentence; a hole where it is shown in the title only."""
    if "inline" not in arguments.named.get("display", "inline"):
        return ""
    text, place = "", 0
    for item in map(plain, arguments.positional):
        if item.upper() in ("N", "S", "E", "W"):
            text, place = f"{text}{item.upper()} ", 0
        elif is_number(item) and place < 3:
            text, place = f"{text}{item}{'°′″'[place]}", place + 1
        else:
            break
    if not re.search("[NSEW] $", text):
        parts = re.split("[°′″]", text)
        text = f"{parts[0]}, {parts[1]}" if len(parts) == 3 else ""
    return text.strip()


MAX_EXPRESSION_CHARACTERS = 300
_EXPRESSION_TOKEN = re.compile(r"([0-9.]++(?:[eE][+-]?[0-9]++)?|round|mod|div|[-+*/^()])|[^\s]")


def evaluate(expression: str) -> str | None:
    """The value of an {{#expr:}} as MediaWiki writes it; None for what is no arithmetic of numbers."""
    tokens = _EXPRESSION_TOKEN.findall(expression[:MAX_EXPRESSION_CHARACTERS])
    if len(expression) > MAX_EXPRESSION_CHARACTERS or "" in tokens:
        return None
    try:
        number, rest = _sum_of(tokens, 0)
        return _written(number) if rest == len(tokens) and tokens else None
    except (ArithmeticError, ValueError, IndexError, RecursionError, TypeError):
        return None


def _sum_of(tokens: list[str], position: int) -> tuple[float, int]:
    """Round binds loosest, then + and -, then * / mod, then ^ and signs, as MediaWiki has it."""
    return _binary(tokens, position, 0)


_LEVELS: tuple[tuple[str, ...], ...] = (("round",), ("+", "-"), ("*", "/", "div", "mod"), ("^",))


def _binary(tokens: list[str], position: int, level: int) -> tuple[float, int]:
    if level == len(_LEVELS):
        return _operand(tokens, position)
    left, position = _binary(tokens, position, level + 1)
    while position < len(tokens) and tokens[position] in _LEVELS[level]:
        operator = tokens[position]
        right, position = _binary(tokens, position + 1, level + 1)
        left = _apply(operator, left, right)
    return left, position


def _operand(tokens: list[str], position: int) -> tuple[float, int]:
    token = tokens[position]
    if token == "(":
        number, position = _binary(tokens, position + 1, 0)
        if tokens[position] != ")":
            raise ValueError("a bracket is not closed")
        return number, position + 1
    if token in "+-":
        number, position = _operand(tokens, position + 1)
        return (-number if token == "-" else number), position
    return float(token), position + 1


def _apply(operator: str, left: float, right: float) -> float:
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/" | "div":
            return left / right
        case "mod":
            return float(int(left) % int(right))
        case "round":
            return float(round(left * 10 ** int(right) + (1e-9 if left > 0 else -1e-9))) / 10 ** int(right)
    power = left**right
    if isinstance(power, complex):
        raise ValueError("no real number")
    return power


def _written(number: float) -> str:
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else f"{number:.14g}"
