"""What tests and benchmarks/curation.py plant into good text: boilerplate, junk, personal data, evaluation examples, languages.

Everything is drawn from the `random.Random` that is handed in.
"""

import html
from random import Random

import idna

# The Universal Declaration of Human Rights, articles 1 and 19 and more (public domain).
RIGHTS = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and should a"
    "ct towards one another in a spirit of brotherhood. Everyone has the right to freedom of opinion and expression; this rig"
    "ht includes freedom to hold opinions without interference and to seek, receive and impart information and ideas through "
    "any media and regardless of frontiers.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und sollen ei"
    "nander im Geist der Brüderlichkeit begegnen. Jeder hat das Recht auf Meinungsfreiheit und freie Meinungsäußerung; dieses"
    " Recht schließt die Freiheit ein, Meinungen ungehindert anzuhängen sowie über Medien jeder Art Informationen und Gedanke"
    "ngut zu suchen, zu empfangen und zu verbreiten.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience et do"
    "ivent agir les uns envers les autres dans un esprit de fraternité. Tout individu a droit à la liberté d'opinion et d'exp"
    "ression, ce qui implique le droit de ne pas être inquiété pour ses opinions et celui de chercher, de recevoir et de répa"
    "ndre les informations et les idées.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており"
    "、互いに同胞の精神をもって行動しなければならない。すべて人は、意見及び表現の自由に対する権利を有する。",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。人人有权享有主张和发表意见的自由;"
    "此项权利包括持有主张而不受干涉的自由,和通过任何媒介和不论国界寻求、接受和传递消息和思想的自由。",
}
_WORDS = (  # noqa: SIM905
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "body information back parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education"
).split()
_VERBS = (  # noqa: SIM905
    "makes takes gives finds tells asks seems feels leaves calls keeps holds brings writes sits stands loses pays meets includes leads"
).split()
BOILERPLATE_MARKS = (
    "cookies to improve",
    "Privacy policy",
    "Skip to content",
    "Recommended for you",
    "All rights reserved",
    "Share on",
    "Zqmenu",
)


def prose(rng: Random, sentences: int = 20) -> str:
    """Sentences of common words: no meaning, but nothing that a heuristic filter should mind."""
    made = []
    for _ in range(sentences):
        a, b, c, d = (rng.choice(_WORDS) for _ in range(4))
        made.append(f"The {a} of the {b} {rng.choice(_VERBS)} a {c} that {rng.choice(_VERBS)} with the {d} and the {rng.choice(_WORDS)}.")
    return "\n\n".join(" ".join(made[i : i + 4]) for i in range(0, sentences, 4))


def web_page(content: str, rng: Random) -> str:
    """HTML of a page with `content` (HTML) as its main part, and around it what pages have: see `BOILERPLATE_MARKS`."""
    menu = "".join(f'<li><a href="/{rng.choice(_WORDS)}">Zqmenu {rng.choice(_WORDS)}</a></li>' for _ in range(8))
    wrapper = rng.choice(["<main>{}</main>", '<div id="content">{}</div>', '<article class="post">{}</article>'])
    banner = rng.choice(
        ['<div class="cookie-banner">{}</div>', '<div id="gdpr-consent" role="dialog">{}</div>', '<section class="notice">{}</section>']
    )
    side = rng.choice(
        ["<aside><h3>Recommended for you</h3><ul>{}</ul></aside>", '<div class="sidebar"><p>Recommended for you</p><ul>{}</ul></div>']
    )
    foot = rng.choice(["<footer>{}</footer>", '<div id="site-footer">{}</div>', '<div class="bottom">{}</div>'])
    return (
        "<!DOCTYPE html><html><head><title>A page</title><style>p {color: red}</style><script>var a = 1;</script></head><body>"
        f'<a class="skip-link" href="#content">Skip to content</a><header><nav><ul>{menu}</ul></nav></header>'
        + banner.format("<p>We use cookies to improve your experience.</p><button>Accept all</button>")
        + wrapper.format(content)
        + side.format(menu)
        + '<div class="share-buttons"><a href="#">Share on A</a> <a href="#">Share on B</a></div>'
        + foot.format(f'<p>© {rng.randint(2001, 2024)} A Company. All rights reserved.</p><p><a href="/p">Privacy policy</a></p>')
        + "</body></html>"
    )


def paragraphs(text: str) -> str:
    """Text as HTML paragraphs."""
    return "".join(f"<p>{html.escape(part)}</p>" for part in text.split("\n\n") if part.strip())


def log(rng: Random, lines: int = 60) -> str:
    """A program's log: each line is unique, and all say the same."""
    return "\n".join(
        f"2024-0{rng.randint(1, 9)}-{rng.randint(10, 28)} {rng.randint(10, 23)}:{rng.randint(10, 59)}:{rng.randint(10, 59)} ERROR "
        f"worker {rng.randint(1, 99)}: "
        f"could not connect to the database server on port {rng.randint(1000, 9999)}, will try again in {rng.randint(1, 60)} seconds"
        for _ in range(lines)
    )


def repeated(rng: Random, times: int = 30) -> str:
    """Spam: the same few words over and over, joined in changing ways."""
    words = [rng.choice(_WORDS) for _ in range(9)]
    return " ".join(" ".join(words) + rng.choice([".", "!", ",", " -"]) for _ in range(times))


def gibberish(rng: Random, words: int = 120) -> str:
    """Random letters in words of ordinary length."""
    return " ".join("".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9))) for _ in range(words))


def symbols(rng: Random, characters: int = 800) -> str:
    return "".join(rng.choice("#$%&*+-/<=>@^_|~0123456789 \n") for _ in range(characters))


NOTICE_ENDS = ("to see this site.", "and their partners.", "our Privacy Policy.", "the Terms of Use apply.")


def notice(rng: Random) -> str:
    """A line that a site says of itself, in one of many wordings."""
    return (
        f"{rng.choice(['Please', 'Do', 'You have to', 'First'])} {rng.choice(['enable', 'turn on', 'activate'])} JavaScript "
        f"{rng.choice(['and reload the page ', 'in your browser ', ''])}{NOTICE_ENDS[0]}",
        f"{rng.choice(['This site uses', 'We use', 'Our pages make use of'])} cookies of the {rng.choice(_WORDS)} {NOTICE_ENDS[1]}",
        f"What we know of your {rng.choice(_WORDS)} is said in {NOTICE_ENDS[2]}",
        f"For each {rng.choice(_WORDS)} {NOTICE_ENDS[3]}",
    )[rng.randrange(4)]


def spelling(domain: str, rng: Random) -> str:
    """An address on the domain or below it, in one of the forms that addresses come in."""
    host = rng.choice(["", "www.", "cdn.", "a.b-c.", "WWW."]) + rng.choice([domain, domain.upper(), idna.encode(domain).decode()])
    scheme = rng.choice(["http://", "https://", "HTTPS://", "//", "http://user:word@"])
    return scheme + host + rng.choice(["", ".", ":8080", ":443"]) + rng.choice(["", "/", f"/{rng.choice(_WORDS)}?q=1#top", "?q=a@b"])


def look_alike(domain: str, rng: Random) -> str:
    """An address that has the domain in it and lies elsewhere."""
    name = rng.choice(_WORDS)
    return rng.choice(
        [
            f"https://{name}{domain}/",
            f"https://{domain}.{name}.org/",
            f"https://{name}.org/{domain}/",
            f"https://{name}.org/?from=https://{domain}/",
            f"https://{domain}@{name}.org/",
            f"https://{domain.partition('.')[0]}.{name}/",
            f"https://{domain.partition('.')[2]}/",
        ]
    )


def personal_data(rng: Random) -> list[tuple[str, str]]:
    """(kind, what) of each kind, each valid by its own check."""
    name = f"{rng.choice(_WORDS)}.{rng.choice(_WORDS)}{rng.randint(1, 99)}"
    return [
        ("email", f"{name}@{rng.choice(_WORDS)}{rng.choice(_WORDS)}.{rng.choice(['com', 'org', 'de', 'co.uk'])}"),
        ("phone", rng.choice([f"+49 30 {rng.randint(2000000, 8999999)}", f"(212) {rng.randint(220, 989)}-{rng.randint(1000, 9999)}"])),
        ("ip", f"{rng.choice([8, 52, 93, 141, 185])}.{rng.randint(1, 254)}.{rng.randint(1, 254)}.{rng.randint(1, 254)}"),
        ("card", _card(rng)),
        ("iban", _iban(rng)),
        ("ssn", f"{rng.randint(100, 600)}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}"),
    ]


# Each looks like personal data and is none.
NO_PERSONAL_DATA = (
    "someone@example.org",
    "192.0.2.17",
    "127.0.0.1",
    "239.255.255.250",
    "10.20.30.40",
    "version 6.1.12.4",
    "4111 1111 1111 1112",
    "DE89 3704 0044 0532 0130 01",
    "2024-03-17 10:22:01",
    "ISBN 978-3-16-148410-0",
    "0x7fff5fbff8c0",
    "12345678901234567890",
    "000-12-3456",
    "a@b",
    "2001:db8::1",
    "std::vector::iterator",
    "12:34:56",
    "sub DB::DB {}",
    "$::a and ::b",
    "git push fd::7,8",
    "130.155.160.0/255.255.240.0",
    "Boston, MA  02110-1301, USA",
    "02-29-2000",
    "02/29/2000",
    "00 01 02 03 04 05 06 07-08 09 0a",
    "03 00 00 31",
    "02/29/2000 12:00",
    "(07/21/2002",
    "01-02-2024 12:00",
    "04-01 13:50",
    "https://web.archive.org/web/20210124231631/http://x.org/",
    "https://web.archive.org/web/20040103182416id_/http://x.org/",
    "2515 1274 1229 12",
    "43.7.2.1. Rules",
    "2.20.1.156.gf9916",
    "17-May-2018::18:30:19",
    "4 Jan 2004::",
    "RFC 2822::",
    "autovt@tty4.service and git-maintenance@hourly.timer",
    "git@github.com:me/it.git",
)


def _card(rng: Random) -> str:
    digits = [4, *(rng.randint(0, 9) for _ in range(14))]
    total = sum(sum(divmod(2 * d, 10)) if i % 2 == 0 else d for i, d in enumerate(digits))
    number = "".join(map(str, digits)) + str(-total % 10)
    return rng.choice([number, " ".join(number[i : i + 4] for i in range(0, 16, 4)), "-".join(number[i : i + 4] for i in range(0, 16, 4))])


def _iban(rng: Random) -> str:
    account = f"{rng.randint(0, 10**18 - 1):018d}"
    check = 98 - int(account + "131400") % 97  # DE00 as digits
    number = f"DE{check:02d}{account}"
    return rng.choice([number, " ".join(number[i : i + 4] for i in range(0, 22, 4))])


def inserted(text: str, passage: str, rng: Random) -> str:
    """`text` with `passage` between two of its words, in the same line."""
    words = text.split(" ")
    place = rng.randint(1, max(1, len(words) - 1))
    return " ".join([*words[:place], passage, *words[place:]])


def retouched(passage: str, rng: Random, share: float = 0.05) -> str:
    """Other case and punctuation, and that share of words exchanged: a copy that no exact comparison finds."""
    words = [rng.choice(_WORDS) if rng.random() < share else word for word in passage.split()]
    return " ".join(word.upper() if rng.random() < 0.1 else word.rstrip(".,") for word in words)
