"""Personal data: e-mail addresses and public IPv4 addresses are masked, as FineWeb does (arXiv 2406.17557)."""

import ipaddress
import re

from megagpt.config import Config
from megagpt.corpus.filters.spec import FilterSpec, thresholds_only, with_text
from megagpt.documents import Document, Rejected


class PersonalDataConfig(Config):
    """Mask e-mail addresses and public IPv4 addresses. null leaves them."""

    email_replacement: str | None = "email@example.com"
    """FineWeb takes turns between this and firstname.lastname@example.org; here a text's result depends on the text alone."""
    ip_replacement: str | None = "22.214.171.124"
    """FineWeb's first replacement; private and reserved addresses stay as they are."""


# FineWeb's expression without address literals; the lookbehind spares a scan from every inner character.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9!#$%&'*+/=?^_`{|}~.-])[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
)
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"


_IPV4 = re.compile(rf"(?<![\d.]){_OCTET}(?:\.{_OCTET}){{3}}(?!\.?\d)", re.ASCII)


def personal_data(document: Document, config: PersonalDataConfig) -> Document | Rejected:
    """Mask e-mail addresses and public IPv4 addresses by fixed texts; private and reserved addresses stay. Refuses nothing."""
    text, email, address = document.text, config.email_replacement, config.ip_replacement
    if email is not None and "@" in text:
        text = _EMAIL.sub(lambda _: email, text)
    if address is not None:
        text = _IPV4.sub(lambda match: address if _is_public(match.group()) else match.group(), text)
    return with_text(document, text)


def _is_public(address: str) -> bool:
    return ipaddress.IPv4Address(address).is_global


PERSONAL_DATA = FilterSpec(PersonalDataConfig, thresholds_only(personal_data))
