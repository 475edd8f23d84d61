"""What differs between the wikis of two languages: names of file and category namespaces, of link sections, script variants."""

from collections.abc import Iterable
from dataclasses import dataclass, field

FILE_AND_CATEGORY: dict[str, tuple[str, ...]] = {
    "en": ("file", "image", "category", "media"),
    "de": ("datei", "bild", "kategorie", "medium"),
    "fr": ("fichier", "image", "catégorie", "média"),
    "es": ("archivo", "imagen", "categoría", "medio"),
    "it": ("file", "immagine", "categoria"),
    "pt": ("ficheiro", "arquivo", "imagem", "categoria", "multimédia", "mídia"),
    "pl": ("plik", "grafika", "kategoria"),
    "ru": ("файл", "изображение", "категория", "медиа"),
    "ja": ("ファイル", "画像", "カテゴリ", "メディア"),
    "zh": ("文件", "檔案", "档案", "图像", "圖像", "分类", "分類", "媒体文件", "媒體檔案"),
    "bg": ("файл", "картинка", "категория", "медия"),
}
"""Names and aliases of namespaces whose links show a file or nothing; those of English hold on every wiki."""

LINK_SECTIONS: dict[str, tuple[str, ...]] = {
    "en": ("references", "external links", "external link", "see also", "further reading", "notes", "footnotes", "citations")
    + ("notes and references", "references and notes", "notes and citations"),
    "de": ("weblinks", "einzelnachweise", "siehe auch", "literatur", "quellen", "fußnoten", "belege", "anmerkungen")
    + ("einzelnachweise und anmerkungen", "anmerkungen und einzelnachweise", "literatur und quellen", "nachweise"),
    "fr": ("voir aussi", "notes et références", "références", "notes", "liens externes", "lien externe", "bibliographie")
    + ("articles connexes", "article connexe", "annexes", "références et notes", "sources"),
    "es": ("referencias", "enlaces externos", "véase también", "bibliografía", "notas", "notas y referencias", "fuentes")
    + ("referencias y notas", "enlace externo"),
    "it": ("note", "bibliografia", "voci correlate", "collegamenti esterni", "altri progetti", "riferimenti"),
    "pt": (
        "referências",
        "ligações externas",
        "ver também",
        "bibliografia",
        "notas",
        "notas e referências",
        "leitura adicional",
    )
    + ("ligação externa", "referências e notas"),
    "pl": ("przypisy", "linki zewnętrzne", "zobacz też", "bibliografia", "uwagi"),
    "ru": ("примечания", "ссылки", "литература", "см. также", "источники", "сноски", "смотри также"),
    "ja": ("脚注", "関連項目", "外部リンク", "参考文献", "出典", "注釈", "脚注・出典", "注釈・出典", "関連文献"),
    "zh": ("参考文献", "參考文獻", "外部链接", "外部連結", "外部鏈接", "参见", "參見", "参看", "參看", "注释", "註釋", "注釋")
    + ("参考资料", "參考資料", "延伸阅读", "延伸閱讀", "相关条目", "相關條目", "脚注", "註腳", "来源", "來源", "另见"),
    "bg": ("източници", "външни препратки", "вижте също", "бележки", "литература"),
}
"""Headings of sections that hold only links, books or notes, in lower case."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "zh": ("zh-hans", "zh-cn", "zh-sg", "zh-my", "zh", "zh-hant", "zh-tw", "zh-hk", "zh-mo"),
    "sr": ("sr-ec", "sr-cyrl", "sr", "sr-el", "sr-latn"),
    "kk": ("kk-cyrl", "kk-kz", "kk", "kk-latn", "kk-tr", "kk-arab", "kk-cn"),
    "uz": ("uz-latn", "uz", "uz-cyrl"),
    "ku": ("ku-latn", "ku", "ku-arab"),
    "tg": ("tg-cyrl", "tg", "tg-latn"),
    "gan": ("gan-hans", "gan", "gan-hant"),
    "iu": ("ike-cans", "iu", "ike-latn"),
    "shi": ("shi-tfng", "shi", "shi-latn"),
}
"""Codes of -{ }- rules by language, the one that is taken first in front."""


@dataclass(frozen=True, slots=True)
class Site:
    """A wiki: its language ("" if the dump does not say), and what of its articles goes. Names are in lower case."""

    language: str = ""
    drop_links: frozenset[str] = frozenset(FILE_AND_CATEGORY["en"])
    link_sections: frozenset[str] = field(default_factory=lambda: _names(LINK_SECTIONS.values()))

    @property
    def variants(self) -> tuple[str, ...]:
        """The codes of script variants, or none."""
        return VARIANTS.get(self.language, ())

    @property
    def has_variants(self) -> bool:
        return self.language in VARIANTS


def site_of(language: str, namespaces: Iterable[str] = ()) -> Site:
    """The site of a language code; `namespaces` are the names that a dump's siteinfo gives its files and categories."""
    code = language.lower().partition("-")[0]
    own = {name.lower().replace("_", " ") for name in namespaces}
    known = FILE_AND_CATEGORY.get(code, ())
    drop_links = frozenset((*FILE_AND_CATEGORY["en"], *known, *own) if code else (*_names(FILE_AND_CATEGORY.values()), *own))
    sections = (*LINK_SECTIONS["en"], *LINK_SECTIONS[code]) if code in LINK_SECTIONS else _names(LINK_SECTIONS.values())
    return Site(code, drop_links, frozenset(sections))


def _names(groups: Iterable[tuple[str, ...]]) -> frozenset[str]:
    return frozenset(name for group in groups for name in group)


DEFAULT_SITE = site_of("")
