"""The templates that are known, by name: what shows nothing in an article, what shows what, on all wikis and by language."""

from collections.abc import Callable

from megagpt.corpus.extraction.wiki_countries import COUNTRIES
from megagpt.corpus.extraction.wiki_phrases import (
    any_ship,
    as_of,
    author_year,
    date_of,
    foreign,
    foreign_plain,
    ipa,
    ipa_in_pieces,
    ipa_sounds,
    japanese,
    marriage,
    old_style_date,
    person,
    respelling,
    ship_class,
    ship_of,
    span,
)
from megagpt.corpus.extraction.wiki_render import (
    Arguments,
    Renderer,
    angle,
    argument,
    block,
    constant,
    converted,
    coordinates,
    currency,
    element,
    fraction,
    height,
    joined,
    last,
    lines,
    money,
    nuclide,
    plain,
    raised,
    value,
)

SILENT = frozenset(
    [
        "sfn",
        "sfnp",
        "sfnm",
        "efn",
        "efn-ua",
        "efn-lr",
        "refn",
        "ref",
        "r",
        "rp",
        "reflist",
        "notelist",
        "notes",
        "cn",
        "fact",
        "clarify",
        "when",
        "who",
        "which",
        "by whom",
        "where",
        "why",
        "citation needed",
        "page needed",
        "verify source",
        "failed verification",
        "dead link",
        "better source",
        "unreliable source?",
        "dubious",
        "vague",
        "according to whom",
        "specify",
        "update after",
        "update inline",
        "original research inline",
        "non-primary source needed",
        "disambiguation needed",
        "anchor",
        "visible anchor end",
        "clear",
        "clear left",
        "clear right",
        "-",
        "toc",
        "toc right",
        "toc left",
        "toc limit",
        "div col",
        "div col end",
        "col div",
        "end div col",
        "col-begin",
        "col-end",
        "col-break",
        "col-2",
        "col-3",
        "col-4",
        "col-5",
        "col-start",
        "colbegin",
        "colend",
        "refbegin",
        "refend",
        "columns-start",
        "multicol",
        "nowrap begin",
        "nowrap end",
        "flagicon",
        "flag icon",
        "increase",
        "decrease",
        "steady",
        "increasenegative",
        "decreasepositive",
        "ntsh",
        "hs",
        "sort key",
        "shy",
        "zwnj",
        "zwj",
        "use dmy dates",
        "use mdy dates",
        "short description",
        "pp",
        "authority control",
        "portal",
        "commons",
        "commons category",
        "listen",
        "wide image",
        "cite",
        "fakt",
        "quelle",
        "belege fehlen",
        "refrequire",
        "refnec end",
        "référence souhaitée",
        "cita requerida",
        "carece de fontes",
        "senza fonte inline",
        "cn-span",
        "нет источника",
        "нет аи",
        "источник?",
        "fakt/doprecyzować",
        "要出典",
        "要検証",
        "来源请求",
        "來源請求",
        "notetag",
        "noteta",
        "0",
        "sfn2",
        "odn",
        "przypis",
        "sn",
        "u r",
        "начало цитаты",
        "конец цитаты",
        "конец кол",
        "кол",
        "fn",
        "fna",
        "fnz",
        "refh",
        "rh",
        "ref-en",
        "ref-de",
        "ref-fr",
        "en icon",
        "de icon",
        "fr icon",
        "ru icon",
        "it icon",
        "es icon",
        "dmoz",
        "s-start",
        "s-end",
        "main",
        "see also",
        "further",
        "about",
        "other uses",
        "hatnote",
        "redirect",
        "distinguish",
        "details",
        "main article",
        "coord missing",
        "inflation-fn",
        "inflation/fn",
        "weasel-inline",
        "weasel inline",
        "qualify evidence",
        "refimprove",
        "page?",
        "full citation needed",
        "attribution needed",
        "as written end",
        "sic end",
        "nobots",
        "bots",
        "émoticône",
        "clr",
        "clear all",
        "br",
        "break",
        "spaced end",
    ]
)
"""Marks of notes, maintenance tags and layout: no reader misses a text where they stood."""
SILENT_BEGINNINGS = ("infobox", "pp-", "cite ", "sfn ", "стб-", "navbox", "stub", "use ")


def _second_or_first(arguments: Arguments) -> str:
    return arguments.first_of("2", "1")


def all_of(names: str, renderer: Renderer) -> dict[str, Renderer]:
    """The same renderer for names between bars."""
    return dict.fromkeys(names.split("|"), renderer)


def constants(pairs: str) -> dict[str, Renderer]:
    """name=text, between bars."""
    return {name: constant(text) for name, _, text in (pair.rpartition("=") for pair in pairs.split("|"))}


def _chem2(arguments: Arguments) -> str:
    """{{chem2|SO4(2-)}}: the charge in brackets is raised."""
    text = plain(arguments.at(1))
    head, bracket, charge = text.rpartition("(")
    raised_charge = bracket and charge.endswith((")",)) and charge[-2:-1] in "+-−"
    return f"{head}<sup>{charge[:-1]}</sup>" if raised_charge else text


def _spaced(arguments: Arguments) -> str:
    return " "


def _music(arguments: Arguments) -> str:
    names = {"sharp": "♯", "#": "♯", "flat": "♭", "b": "♭", "natural": "♮"}
    return names.get(arguments.at(1).lower(), arguments.at(1))


def _gauge(arguments: Arguments) -> str:
    """{{RailGauge|1435mm}} reads "1435 mm"."""
    text = plain(arguments.at(1))
    digits = len(text) - len(text.lstrip("0123456789.,"))
    unit = text[digits:].strip()
    return f"{text[:digits]} {unit}".strip() if digits else text


def _country(arguments: Arguments) -> str:
    """{{flag|DEU}} and {{flag|Germany}}."""
    return arguments.named.get("name") or COUNTRIES.get(plain(arguments.at(1)), arguments.at(1))


def _rupees(arguments: Arguments) -> str:
    """{{INRConvert|5|c}} reads "₹5 crore"."""
    words = {"k": "thousand", "m": "million", "b": "billion", "t": "trillion", "l": "lakh", "c": "crore", "lc": "lakh crore"}
    return f"₹{plain(arguments.at(1))} {words.get(plain(arguments.at(2)), '')}".strip()


def _list(arguments: Arguments) -> str:
    """Lists that stand in one argument, with their own marks, or in many."""
    return "\n" + "\n".join(item for item in arguments.positional if item) + "\n"


COMMON: dict[str, Renderer] = {
    **constants(
        "nbsp= |space= |spaces= |thinsp= |hairsp= |ensp= |emsp= |ndash=–|mdash=—|--=—|"
        "spaced ndash= – |spnd= – |snd= – |snds= – |dash=–"
        "|spaced en dash= – |em dash=—|en dash=–|mdashb=—|'=&#39;|times=×|pi=π|deg=°|"
        "degree=°|bullet=•|middot=·|·= · |•= • |dot= · |euro=€"
        '|hyphen=-|\'s=&#39;s|\' "=&#39;"|" \'="&#39;|\'"=&#39;"|"\'="&#39;|-"="|!-=|-|okina=ʻ|`okina=ʻ|'
        "hamza=ʼ|ayin=ʽ|dagger=†|double-dagger=‡|asterisk=*"
        "|sqrt sign=√|prime=′|pprime=″|lambda=λ|alpha=α|beta=β|gamma=γ|delta=δ|mu=μ|"
        "sigma=σ|omega=ω|phi=φ|theta=θ|epsilon=ε|minus=−"
        "|plus-minus=±|numero=№|sect=§|ellipsis=…|...=…|sic=[sic]|(=(|)=)|((={{|))=}}|"
        "lbrace={|rbrace=}|(({={{|[=[|]=]|bracket=["
        "|pound=£|en space= |trade=™|fraction slash=⁄|snd.= – "
    ),
    "=": constant("="),
    "!": constant("|"),
    "pipe": constant("|"),
    "!!": constant("||"),
    "equals": constant("="),
    **all_of("convert|cvt|converter|convertir|converti|conversion|convert/old", converted),
    **all_of("frac|fraction|sfrac|bruch|fracción|fração|fract", fraction),
    **all_of("val|value|valor", value),
    **all_of("e|e-|esp", raised("×10")),
    **all_of("10^|10p", raised("10")),
    "pow": lambda a: f"{a.at(1)}<sup>{a.at(2)}</sup>",
    **all_of("sup|smallsup|exp", argument("1", before="<sup>", after="</sup>")),
    **all_of("sub|smallsub|ind", argument("1", before="<sub>", after="</sub>")),
    "su": lambda a: f"{a.first_of('p', '1')} {a.first_of('b', '2')}".strip(),
    **all_of("height", height),
    **all_of("railgauge|track gauge", _gauge),
    **all_of("gaps", joined()),
    **all_of("nts|ntsc|number table sorting|formatnum|num|number|digits|sort number", argument("1")),
    **all_of("sort|hidden sort", _second_or_first),
    **all_of("sortname", person),
    **all_of("us$|usd|us dollar", money("US$")),
    **all_of("inr|indian rupee|rupee|indian rupees|₹", money("₹")),
    **all_of("gbp|£|pound sterling|gb£", money("£")),
    **all_of("eur|€|euros", money("€")),
    **all_of("jpy|¥|yen", money("¥")),
    **all_of("a$|aud|au$", money("A$")),
    **all_of("c$|cad|ca$|cdn$", money("C$")),
    **all_of("nz$|nzd|nzd$", money("NZ$")),
    **all_of("hk$|hkd", money("HK$")),
    **all_of("s$|sgd", money("S$")),
    **all_of("nt$|ntd|twd", money("NT$")),
    **all_of("cny|rmb|cn¥", money("CN¥")),
    **all_of("krw|₩|south korean won", money("₩")),
    **all_of("php|₱|philippine peso", money("₱")),
    **all_of("rub|₽|russian ruble", money("₽")),
    **all_of("brl|r$", money("R$")),
    **all_of("nis|ils|₪", money("₪")),
    **all_of("ngn|₦|naira", money("₦")),
    **all_of("pkr|rs|₨|rs.", money("Rs ")),
    **all_of("chf", money("CHF ")),
    **all_of("zar|south african rand", money("R")),
    **all_of("bdt|৳", money("৳")),
    "currency": currency,
    "inrconvert": _rupees,
    **all_of("inrconvert/old", money("₹")),
    **all_of("chem|chem/link|chem name", element),
    **all_of("chem2|ce", _chem2),
    **all_of("simplenuclide|simplenuclide2|nuclide|nuclide2|isotope", nuclide),
    **all_of("radic|sqrt", lambda a: f"√{a.at(1)}" if len(a.at(1)) < 2 or a.at(1).isdigit() else f"√({a.at(1)})"),
    **all_of("abs|mabs", angle("||")),
    **all_of("angbr|angle bracket|angbr ipa", angle("⟨⟩")),
    **all_of("bra", angle("⟨|")),
    **all_of("music", _music),
    **all_of("keypress|key press|key|keys|button key", joined("+")),
    **all_of("circa|c.|ca|ca.", argument("1", before="c. ")),
    **all_of("floruit|fl.|fl", argument("1", before="fl. ")),
    **all_of("reign|r.", span("r. ")),
    **all_of("as of|asof", as_of),
    **all_of("born|b.", argument("1", before="b. ")),
    **all_of("died|d.", argument("1", before="d. ")),
    **all_of("oldstyledate|oldstyledatedy|oldstyledateny", old_style_date),
    **all_of(
        "start date|end date|start date and age|birth date|birth date and age|death date|"
        "death date and age|date|dts|film date"
        "|birth date and given age|bda|dob|startdate|release date",
        date_of("ymd", "en"),
    ),
    **all_of(
        "start-date|end-date|birth-date|birth-date and age|death-date|death-date and age|date table sorting", argument("1")
    ),
    **all_of("ship", any_ship),
    **all_of("sclass|sclass2|sclass-|sclass2-", ship_class),
    **{
        prefix.lower(): ship_of(prefix)
        for prefix in [
            "HMS",
            "USS",
            "SS",
            "MV",
            "RMS",
            "SMS",
            "HMAS",
            "HMCS",
            "HMNZS",
            "HNLMS",
            "HDMS",
            "HSwMS",
            "USNS",
            "USCGC",
            "USRC",
            "RV",
            "MS",
            "MT",
            "INS",
            "ORP",
            "GTS",
            "RFA",
            "RMS",
            "PS",
            "TSS",
            "USAT",
            "CSS",
            "HMT",
            "HMY",
            "HMSAS",
            "SAS",
            "BAP",
            "ARA",
            "KRI",
            "ROKS",
            "TCG",
            "PNS",
            "MY",
            "FV",
            "RNLB",
            "NRP",
            "HNoMS",
            "NOAAS",
            "USAV",
            "DSV",
            "TS",
            "USC&GS",
        ]
    },
    "marriage": marriage,
    **all_of("harvtxt|harvcoltxt", author_year("{who} ({year}{where})")),
    **all_of("harvnb|harvcolnb|harvard citation no brackets", author_year("{who} {year}{where}")),
    **all_of("harv|harvcol|harvard citation", author_year("({who} {year}{where})")),
    **all_of("harvp|harvard citation text", author_year("{who} ({year}{where})")),
    **all_of("lang|wikt-lang|transl|translit|transliteration|script|rtl-lang|wt|langue|w języku|mono-lang", last),
    **all_of("langx|lang-x|langx2", foreign_plain),
    **all_of("nihongo|nihongo2|nihongo3|nihongo foot|nihongo krt|japonais", japanese),
    **all_of("ipa|ipa-all|api|afi|мфа|lautschrift", ipa),
    **all_of("ipac", lambda a: ipa_in_pieces("", "", a)),
    **all_of("ipalink|ipablink|ipa link|phon", angle("[]")),
    **all_of("ipaslink", angle("//")),
    **all_of("respell|pronunciation respelling", respelling),
    **all_of("color|font color|font colour|colour|resize|font size|fontsize|fontcolor|linktext|text color", last),
    "linktext": joined(),
    "font": argument("text", "1"),
    "wikt": last,
    **all_of(
        "nowrap|nobr|nobreak|abbr|abbrv|tooltip|small|smaller|big|bigger|large|larger|em|"
        "strong|smallcaps|sc|mvar|var|math|bigmath|intmath"
        "|tmath|nom|not a typo|proper name|strikethrough|code|mono|kbd|ill|"
        "interlanguage link|interlanguage link multi|link-interwiki"
        "|visible anchor|vanchor|center|noitalic|nobold|normal|longitem|overline|"
        "underline|italic|bold|i|b|nay|yea|rom|unicode|typo"
        "|as written|flagdeco|flaglist|native name|resized|sm|"
        "smalldiv|tq|proper|chinese|polytonic|hebrew|title"
        "|url|lower|raise|strong|samp|nobreak begin|wide|midsize|text|raised|disp|dfn|"
        "ins|del|varserif|serif|sans-serif|lc|uc|hlist item"
        "|no wrap|no break|nwr|nwrap|nolink|comment|hover title|hoover|title case|"
        "noprint end|abs link|rp-text",
        argument("1", "text", "quote"),
    ),
    **all_of("flag|flagcountry|flagu|flagioc|flag+link|fb", _country),
    "native name": _second_or_first,
    "ill": argument("lt", "1"),
    "interlanguage link": argument("lt", "1"),
    "color box": argument("2"),
    "legend": argument("2"),
    "url": _second_or_first,
    "sic": lambda a: f"{a.at(1) + ' ' if a.at(1) else ''}[sic]",
    **all_of(
        "quote|blockquote|cquote|quotation|rquote|bquote|centered pull quote|pull quote|"
        "verse translation|poemquote|poem quote"
        "|long quote|quote frame|zitat|cytat|quote2|цитата|cita|citação|citazione|"
        "citation bloc|bloc citation|zitat-de|frquote"
        "|q|imagequote|blockquotation",
        block("1", "text", "quote", "texto", "texte", "citation"),
    ),
    **all_of(
        "quote box|quotebox|rquotebox|citation encadrée|zitat kasten|cytat blok|врезка|"
        "caja de cita|cita destacada|citation boîte",
        block("quote", "text", "1", "texte", "cita", "treść", "текст", "contenu"),
    ),
    **all_of(
        "poem|verse|poème|poema|plainlist|plain list|flatlist|flat list|columns-list|"
        "bulleted|stack|columns|nobullet"
        "|startplainlist|align|aligned|pre2|prewrap|quote text|indent text|block indent|"
        "bi|blist|colonnes|vorlage:linksbündig",
        block("text", "content", "1", "texte", "col1"),
    ),
    **all_of(
        "ubl|unbulleted list|vunblist|bulleted list|ordered list|unordered list|olist|"
        "ublist|numbered list|indented plainlist|blist",
        lines,
    ),
    **all_of("hlist|horizontal list|hlist-comma|cslist|comma separated entries|csl|enum|pipelist", joined(" · ")),
    "cslist": joined(", "),
    "comma separated entries": joined(", "),
    "collapsible list": _list,
    "stacked": _list,
    "equation": argument("1", before="\n", after="\n"),
    "numblk": argument("2", before="\n", after="\n"),
    "bi": last,
    "align": last,
    "block indent": last,
    "coord": coordinates,
    "coords": coordinates,
    "abbrlink": argument("1"),
    "vol.": argument("1", before="Vol. "),
    "p.": argument("1", before="p. "),
    "pp.": argument("1", before="pp. "),
    "no.": argument("1", before="No. "),
    "isbn": argument("1", before="ISBN "),
    "oclc": argument("1", before="OCLC "),
    "issn": argument("1", before="ISSN "),
    "doi": argument("1", before="doi:"),
    "us patent": argument("1", before="U.S. Patent "),
    "bibleref": lambda a: f"{a.at(1)} {a.at(2)}".strip(),
    **all_of("nq|nastaliq|vr|naskh|tmath|unichar|sub-title|nastaleeq", argument("1")),
    "eqm": constant("⇌"),
    "eqm2": constant("⇌"),
    "carbon": constant("C"),
    "hydrogen": constant("H"),
    "oxygen": constant("O"),
    "format price": argument("1"),
    "ordinal": argument("1"),
    "okay": constant("✓"),
    "spaced": _spaced,
}

ForCode = Callable[[str, str, Arguments], str]
BEGINNINGS: dict[str, ForCode] = {
    "lang-": foreign,
    "ipac-": ipa_in_pieces,
    "ipa-": ipa_sounds,
    "link-": lambda code, language, a: a.at(1),
}
"""Templates with the code of a language in their name."""
