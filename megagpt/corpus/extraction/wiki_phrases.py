"""What templates of Wikipedia show that is a phrase: dates, centuries, ships, foreign words, sounds, sources."""

import re

from megagpt.corpus.extraction.wiki_render import Arguments, Renderer, plain

MONTHS: dict[str, tuple[str, ...]] = {
    "en": ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November")
    + ("December",),
    "de": (
        "Januar",
        "Februar",
        "März",
        "April",
        "Mai",
        "Juni",
        "Juli",
        "August",
        "September",
        "Oktober",
        "November",
        "Dezember",
    ),
    "fr": ("janvier", "février", "mars", "avril", "mai", "juin", "juillet", "août", "septembre", "octobre", "novembre")
    + ("décembre",),
    "es": ("enero", "febrero", "marzo", "abril", "mayo", "junio", "julio", "agosto", "septiembre", "octubre", "noviembre")
    + ("diciembre",),
    "it": ("gennaio", "febbraio", "marzo", "aprile", "maggio", "giugno", "luglio", "agosto", "settembre", "ottobre", "novembre")
    + ("dicembre",),
    "pt": ("janeiro", "fevereiro", "março", "abril", "maio", "junho", "julho", "agosto", "setembro", "outubro", "novembro")
    + ("dezembro",),
    "ru": (
        "января",
        "февраля",
        "марта",
        "апреля",
        "мая",
        "июня",
        "июля",
        "августа",
        "сентября",
        "октября",
        "ноября",
        "декабря",
    ),
    "pl": ("stycznia", "lutego", "marca", "kwietnia", "maja", "czerwca", "lipca", "sierpnia", "września", "października")
    + ("listopada", "grudnia"),
}


def written_date(year: str, month: str, day: str, language: str, *, month_first: bool = False) -> str:
    """A date as the language writes it, of the parts that there are: 6 May 2001, 6. Mai 2001, 6 de mayo de 2001."""
    if language in ("ja", "zh"):
        parts = ((year, "年"), (month, "月"), (day, "日"))
        return "".join(f"{part}{'' if part.endswith(mark) else mark}" for part, mark in parts if part)
    number = int(month) if month.isdecimal() else 0
    month = MONTHS.get(language, MONTHS["en"])[number - 1] if 1 <= number <= 12 else month
    day = day.lstrip("0") if day.isdecimal() else day
    if month_first and day and month:
        return f"{month} {day}" + (f", {year}" if year else "")
    if language == "de" and day.isdecimal():
        day += "."
    separator = " de " if language in ("es", "pt") else " "
    return separator.join(part for part in (day, month, year) if part)


def date_of(order: str, language: str) -> Renderer:
    """A date from numbers in the order given, such as "ymd". One argument alone, or none that is a number, shows as it is."""

    def render(arguments: Arguments) -> str:
        texts = [plain(item) for item in arguments.positional]
        numbers = [item for item in texts[:3] if item]
        if len(texts) >= 1 and (iso := re.fullmatch(r"(-?\d{1,4})-(\d\d?)-(\d\d?)", texts[0])):
            year, month, day = iso.groups()
        elif len(numbers) < 2:
            return numbers[0] if numbers else ""
        else:
            given = dict(zip(order, texts, strict=False))
            year, month, day = given.get("y", ""), given.get("m", ""), given.get("d", "")
        us = language in ("en", "") and order[0] == "y" and not _is_yes(arguments.first_of("df"))
        return written_date(year, month, day, language, month_first=us)

    return render


def _is_yes(value: str) -> bool:
    return value.lower() in ("y", "yes", "true", "1", "dmy")


def as_of(arguments: Arguments) -> str:
    """{{as of|2010|5|3}} reads "As of 3 May 2010"; lc, since, alt and df as on its page."""
    if alt := arguments.named.get("alt"):
        return alt
    year, month, day = (plain(arguments.at(number)) for number in (1, 2, 3))
    us = arguments.first_of("df").lower() in ("us", "mdy")
    text = written_date(year, month, day, "en", month_first=us)
    before = "Since" if arguments.named.get("since") else "As of"
    return f"{before.lower() if arguments.first_of('lc') else before} {text}"


def old_style_date(arguments: Arguments) -> str:
    """{{OldStyleDate|6 May|1950|25 April}} reads "6 May [O.S. 25 April] 1950"."""
    new, year, old = (plain(arguments.at(number)) for number in (1, 2, 3))
    return f"{new} [O.S. {old}] {year}" if old else f"{new} {year}"


def old_style_date_russian(arguments: Arguments) -> str:
    """{{OldStyleDate|26 мая|1799|6 июня}} of ru reads "26 мая (6 июня) 1799"."""
    new, year, old = (plain(arguments.at(number)) for number in (1, 2, 3))
    return f"{old} ({new}) {year}" if old else f"{new} {year}"


def span(before: str) -> Renderer:
    """{{reign|1500|1520}} reads "r. 1500–1520"."""
    return lambda arguments: f"{before}{'–'.join(plain(item) for item in arguments.positional[:2] if item)}"


def life(arguments: Arguments) -> str:
    """{{bd|1879年|3月14日|1955年|4月18日}} of zh reads "（1879年3月14日－1955年4月18日）"."""
    born = plain(arguments.at(1)) + plain(arguments.at(2))
    died = plain(arguments.at(3)) + plain(arguments.at(4))
    return f"（{born}－{died}）"


def century_french(suffix: str = "") -> Renderer:
    """{{s|XIX}} and {{s-|XIX|e}} of fr read "XIXe siècle"; {{s2|XII|e|XIII|e}} reads "XIIe et XIIIe siècles"."""

    def render(arguments: Arguments) -> str:
        items = [plain(item) for item in arguments.positional if item]
        numerals = [item for item in items if item.upper() == item and item not in ("e", "er")]
        ordinals = [f"{numeral}{'er' if numeral == 'I' else 'e'}" for numeral in numerals]
        return f"{' et '.join(ordinals)} siècle{'s' if len(ordinals) > 1 else ''}{suffix}"

    return render


def century(word: str, *, after: bool = False) -> Renderer:
    """{{siglo|XIX||s}} of es reads "siglo XIX"."""

    def render(arguments: Arguments) -> str:
        numeral = plain(arguments.at(1))
        era = {"a": " a. C.", "a. c.": " a. C.", "ac": " a. C."}.get(plain(arguments.at(2)).lower(), "")
        return f"{numeral} {word}{era}" if after else f"{word} {numeral}{era}"

    return render


# ---- names


def ship(prefix: str, name: str, hull: str, form: str) -> str:
    """A ship's name in the forms of Template:Ship: 1 hull, 2 name, 3 name (hull), 4 prefix hull, 6 prefix name, else all."""
    match form:
        case "1" if hull:
            return hull
        case "2":
            return name
        case "3" if hull:
            return f"{name} ({hull})"
        case "4" if hull:
            return f"{prefix} {hull}"
        case "6" | "1" | "3" | "4":
            return f"{prefix} {name}".strip()
    return f"{prefix} {name}".strip() + (f" ({hull})" if hull else "")


def ship_of(prefix: str) -> Renderer:
    """{{USS|Enterprise|CV-6}} reads "USS Enterprise (CV-6)"."""
    return lambda arguments: ship(prefix, *(plain(arguments.at(number)) for number in (1, 2, 3)))


def any_ship(arguments: Arguments) -> str:
    """{{ship|HMS|Victory|1765|6}}."""
    return ship(*(plain(arguments.at(number)) for number in (1, 2, 3, 4)))


def ship_class(arguments: Arguments) -> str:
    """{{sclass|Iowa|battleship}} reads "Iowa-class battleship"; form 0 "Iowa", 1 "Iowa class", 2 "Iowa-class"."""
    name, kind, form = (plain(arguments.at(number)) for number in (1, 2, 3))
    return {"0": name, "1": f"{name} class", "2": f"{name}-class", "4": f"{name}s"}.get(form, f"{name}-class {kind}".strip())


def person(arguments: Arguments) -> str:
    """{{sortname|Albert|Einstein}}."""
    return " ".join(item for item in map(plain, arguments.positional[:2]) if item)


def marriage(arguments: Arguments) -> str:
    """{{marriage|Ann|1900|1910}} reads "Ann (m. 1900–1910)"."""
    years = "–".join(item for item in map(plain, arguments.positional[1:3]) if item)
    return arguments.at(1) + (f" (m. {years})" if years else "")


def author_year(form: str) -> Renderer:
    """Author and year as a part of a sentence: {{harvtxt|Smith|Jones|2000|p=5}} reads "Smith & Jones (2000, p. 5)"."""

    def render(arguments: Arguments) -> str:
        items = [plain(item) for item in arguments.positional if item]
        if last := plain(arguments.first_of("last", "last1")):
            items = [last, plain(arguments.first_of("year", "year1"))]
        if not items:
            return ""
        names, year = (items[:-1], items[-1]) if len(items) > 1 else (items, "")
        who = (
            f"{', '.join(names[:-1])} & {names[-1]}" if 1 < len(names) < 4 else names[0] + (" et al." if len(names) > 3 else "")
        )
        page = arguments.first_of("p", "pp", "loc")
        where = f", {'pp. ' if arguments.first_of('pp') else 'p. ' if arguments.first_of('p') else ''}{page}" if page else ""
        return form.format(who=who, year=year, where=where).replace(" ()", "")

    return render


# ---- languages

LANGUAGE_NAMES = {
    "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali", "br": "Breton",
    "bs": "Bosnian", "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French",
    "ga": "Irish", "gd": "Scottish Gaelic", "gle": "Irish", "gl": "Galician", "grc": "Ancient Greek",
    "grc-gre": "Ancient Greek", "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ka": "Georgian",
    "kk": "Kazakh", "kn": "Kannada", "ko": "Korean", "ku": "Kurdish", "la": "Latin", "lb": "Luxembourgish",
    "lt": "Lithuanian", "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi",
    "ms": "Malay", "mt": "Maltese", "my": "Burmese", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "nb": "Norwegian",
    "pa": "Punjabi", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sa": "Sanskrit", "sh": "Serbo-Croatian", "si": "Sinhala", "sk": "Slovak", "sl": "Slovene", "sq": "Albanian",
    "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "syr": "Syriac", "ta": "Tamil", "te": "Telugu", "th": "Thai",
    "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "yi": "Yiddish",
    "zh": "Chinese",
}  # fmt: skip


def foreign(code: str, language: str, arguments: Arguments) -> str:
    """{{lang-ru|Москва}} reads "Russian: Москва" in English; elsewhere the word alone, since each wiki has its own label."""
    text = arguments.first_of("1", "text")
    label = LANGUAGE_NAMES.get(code, "") if language in ("en", "simple") else ""
    text = _with_letters(text, arguments.at(2))
    return f"{label}: {text}" if label and text and arguments.named.get("label") != "none" else text


def foreign_by_code(arguments: Arguments) -> str:
    """{{langx|ru|Москва}} reads "Russian: Москва"; label= gives another label, none none."""
    label = arguments.named.get("label") or LANGUAGE_NAMES.get(plain(arguments.at(1)).lower(), "")
    text = _with_letters(arguments.first_of("2", "text"), arguments.first_of("3", "translit"))
    return f"{label}: {text}" if label and label != "none" and text else text


def _with_letters(text: str, letters: str) -> str:
    """A foreign word with what it is in Latin letters."""
    return f"{text}, {letters}" if text and letters and not text.isascii() else text


def foreign_plain(arguments: Arguments) -> str:
    """{{langx|ru|Москва}} on other wikis: the word alone."""
    return arguments.first_of("2", "text", "1")


def japanese(arguments: Arguments) -> str:
    """{{nihongo|English|漢字|romaji}} reads "English (漢字, romaji)"."""
    english, *rest = (*arguments.positional, "")
    shown = ", ".join(item for item in rest[:3] if item)
    extra = arguments.first_of("extra")
    shown = ", ".join(item for item in (shown, extra) if item)
    return f"{english} ({shown})".strip() if english and shown else english or shown


# ---- pronunciations


def ipa_sounds(code: str, language: str, arguments: Arguments) -> str:
    """{{IPA-fr|paʁi}} and {{IPAc-en|p|ær|ɪ|s}}: the sounds joined, between slashes or brackets."""
    first = arguments.first_of("1")
    return first if first[:1] in "[/" else f"[{first}]" if first else ""


def ipa_in_pieces(code: str, language: str, arguments: Arguments) -> str:
    """{{IPAc-en|ˈ|m|ɒ|s|k|oʊ}} reads "/ˈmɒskoʊ/"."""
    pieces = [item for item in map(plain, arguments.positional) if item and item.lower() not in _NO_SOUND]
    text = "".join(_SOUNDS.get(piece, {",": ", "}.get(piece, piece)) for piece in pieces).replace("_", " ")
    return (f"/{text}/" if code == "en" else f"[{text}]") if text else ""


_NO_SOUND = frozenset(["lang", "pron", "local", "us", "uk", "audio", "icon", "us_dict"])
_SOUNDS = {
    "'": "ˈ", "tS": "tʃ", "dZ": "dʒ", "S": "ʃ", "Z": "ʒ", "T": "θ", "D": "ð", "N": "ŋ", "@": "ə", "@r": "ər", "A:": "ɑː",
    "i:": "iː", "u:": "uː", "O:": "ɔː", "eI": "eɪ", "aI": "aɪ", "OI": "ɔɪ", "aU": "aʊ", "oU": "oʊ", "I": "ɪ", "E": "ɛ",
    "U": "ʊ", "V": "ʌ", "ae": "æ", "j": "j", "ng": "ŋ", "sh": "ʃ", "zh": "ʒ", "th": "θ", "dh": "ð", "ch": "tʃ", "-": "",
}  # fmt: skip


def ipa(arguments: Arguments) -> str:
    """{{IPA|/x/}}, {{IPA|fr|x}}: the sounds."""
    if len(arguments.positional) > 1 and len(plain(arguments.at(1))) <= 3 and arguments.at(1).isascii() and arguments.at(2):
        text = arguments.at(2)
        return text if text[:1] in "[/" else f"[{text}]"
    return arguments.at(1)


def respelling(arguments: Arguments) -> str:
    """{{respell|MOS|kow}} reads "MOS-kow"; an underscore is a blank between words."""
    return "-".join(item for item in map(plain, arguments.positional) if item).replace("-_-", " ").replace("_", " ")
