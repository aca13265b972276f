"""HTML extraction: boilerplate of many forms out; text, formulas and code exactly kept; pages without content and broken ones say so."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama3.curation.blocks.extract import ExtractHtml, html_to_text, without_markdown
from tests.curation import planted
from tests.curation.steps import judge


@pytest.mark.parametrize("seed", range(12))
def test_planted_boilerplate_goes_and_all_the_text_stays(seed):
    rng = Random(seed)
    text = planted.prose(rng, 12)
    assert html_to_text(planted.web_page(planted.paragraphs(text), rng)) == text


@pytest.mark.parametrize(
    "markup",
    [
        '<div class="navheader"><a href="a">Prev</a> F.1. Something of this chapter <a href="b">Next</a></div>',
        '<div class="tagline">Small. Fast. Done.</div>',
        '<div class="toplang"><p>Available languages: <a href="de">Deutsch</a> | <a href="fr">français</a></p></div>',
        "<p>Last updated 2024-05-31 00:35:55 UTC</p>",
        "<p><i>This page was last modified on 2 May 2020.</i></p>",
        "<p>Last edited by a user on 3 May 2021</p>",
        "<p>Last changed: 2019-01-01</p>",
        "<p>Copyright © 2005-2007 Some People, Others</p>",
        "<p>(c) 2020 by me</p>",
        "<p>Our website uses cookies.</p>",
        "<p>Read our privacy policy and the terms of use.</p>",
    ],
)
def test_what_stands_around_the_text_of_documentation(markup):
    prose = "The view is removed, and no data of the tables below it is changed. It was last updated by the statement before. " * 4
    page = f"<body>{markup}<div><h2>A view</h2><p>{prose}</p></div>{markup}</body>"
    assert html_to_text(page) == f"A view\n\n{prose.strip()}"


@pytest.mark.parametrize(
    "line",
    [
        "Last modified files are listed first by the command when no option is given to it.",
        "Last Modified Time",
        "Copyright 1997 was the year in which the act changed the law of England.",
        "A session uses cookies to keep the state of the user between two requests of HTTP.",
        "A privacy policy tells users which data a service collects, for what, for how long, and whom they can ask.",
        f"{'All that was said of it by the court is in the report. ' * 5}All rights reserved were those of the crown.",
    ],
)
def test_prose_about_such_things_stays(line):
    prose = "<p>A paragraph before it that says something else.</p>"
    assert line in html_to_text(f"<body><article>{prose}<p>{line}</p>{prose}</article></body>")
    assert line in html_to_text(f"<body><article>{prose}<dl><dt>{line}</dt><dd>What it means.</dd></dl>{prose}</article></body>")


def test_anchors_that_are_never_closed_are_no_links():
    part = '<div class="section"><h2><a id="a{0}"/>Part {0}</h2><p>Some text of part {0}, and more of it.</p><pre>code {0}</pre></div>'
    text = html_to_text(f"<body><div class='chapter'>{''.join(map(part.format, range(6)))}</div></body>")
    for i in range(6):
        assert f"Some text of part {i}, and more of it." in text
        assert f"code {i}" in text


def test_notes_beside_the_text_belong_to_it():
    page = "<body><article><p>{}</p></article><aside {{}}><p>A word on that, 1998.</p></aside></body>".format("The text says so. " * 9)
    for name in ('class="footnote brackets"', 'class="admonition tip"'):
        assert "A word on that" in html_to_text(page.format(name))
    for name in ("", 'class="promo"', 'class="sidenav"'):
        assert "A word on that" not in html_to_text(page.format(name))


def test_related_work_is_no_related_posts():
    work, posts = (f'<div class="{name}"><h2>Related</h2><a href="a">An older one</a></div>' for name in ("related-work", "related-posts"))
    text = html_to_text(f"<body><article><p>{'The text of the article. ' * 20}</p>{work}<hr>{posts}</article></body>")
    assert text.count("An older one") == 1


def test_what_is_most_of_a_page_is_the_page():
    """Whatever its name: with six tenths of the text it stays, with four it is what it is called."""
    page = '<body><div class="promo"><p>{}</p></div><div><p>{}</p></div></body>'
    assert "offered" in html_to_text(page.format("It is offered here. " * 20, "The other text. " * 15))
    assert "offered" not in html_to_text(page.format("It is offered here. " * 15, "The other text. " * 30))


def test_content_in_spite_of_its_name():
    """A section named after its heading, a box of prose named sidebar, a page whose body is named after its layout."""
    prose = "Memory that several processes map at the same time must be protected by a lock of some kind. " * 8
    page = (
        f'<body class="has-sidebar cookie-shown"><main><section id="share-memory"><h2>Share memory</h2><p>{prose}</p>'
        "<pre>x = 1</pre></section>"
        '<div class="sidebar"><p>TIP: The lock may be held by one process only, so keep the time short.</p></div></main></body>'
    )
    text = html_to_text(page)
    assert "Share memory" in text
    assert prose.strip() in text
    assert "x = 1" in text
    assert "TIP: The lock" in text


def test_much_prose_is_content_under_any_name_but_a_banner_is_none():
    prose = "<p>" + "A long account of what the committee found, and of what it did then. " * 20 + "</p>"
    page = "<body><article><p>The report follows.</p></article>{}" + f"<div>{'Another part of the page. ' * 80}</div></body>"
    assert "the committee found" in html_to_text(page.format(f'<div class="promo">{prose}</div>'))
    assert "the committee found" not in html_to_text(page.format(f'<div class="cookie-consent">{prose}</div>'))
    assert "Short words" not in html_to_text(page.format('<div class="promo"><p>Short words here.</p></div>'))


def test_markdown_in_a_page_goes():
    assert html_to_text("<article><h2>## A **bold** heading</h2><p>- an *item*</p></article>").split("\n\n") == [
        "A bold heading",
        "an item",
    ]


CODE = 'def f(x):\n    # **not** bold, `a` tick\n    if x > 1:\n\n        return {"a_b": x ** 2}  # [l](u)\n'


@pytest.mark.parametrize(
    "markup",
    [
        "<pre>{}</pre>",
        "<pre><code class='language-python'>{}</code></pre>",
        '<div class="highlight"><table><tr><td class="linenos"><pre>1\n2</pre></td><td><pre><span>{}</span></pre></td></tr></table></div>',
    ],
)
def test_code_keeps_lines_and_indentation(markup):
    code = CODE.replace(">", "&gt;").replace("<", "&lt;")
    assert html_to_text(f"<article><p>Before.</p>{markup.format(code)}<p>After.</p></article>") == f"Before.\n\n{CODE.strip()}\n\nAfter."


def test_code_whose_lines_are_elements():
    lines = "".join(f"<div class='line'>{line}</div>" for line in ["for i in x:", "    print(i)"])
    assert html_to_text(f"<article><pre>{lines}</pre></article>") == "for i in x:\n    print(i)"
    assert html_to_text("<article><pre>a<br>  b</pre></article>") == "a\n  b"
    assert (
        html_to_text("<article><p>Call <code>__init__</code> with <code>**options</code>.</p></article>") == "Call __init__ with **options."
    )


@pytest.mark.parametrize(
    "markup, tex",
    [
        ("<math><mfrac><mi>a</mi><mi>b</mi></mfrac></math>", r"$\frac{a}{b}$"),
        ("<math><msup><mi>e</mi><mrow><mi>i</mi><mi>π</mi></mrow></msup><mo>+</mo><mn>1</mn></math>", "$e^{i π} + 1$"),
        ("<math><msubsup><mi>x</mi><mn>1</mn><mn>2</mn></msubsup></math>", "$x_{1}^{2}$"),
        ("<math><msqrt><mi>x</mi><mi>y</mi></msqrt><mroot><mi>x</mi><mn>3</mn></mroot></math>", r"$\sqrt{x y} \sqrt[3]{x}$"),
        (
            "<math display='block'><mtable><mtr><mtd><mn>1</mn></mtd><mtd><mn>2</mn></mtd></mtr>"
            "<mtr><mtd><mn>3</mn></mtd><mtd><mn>4</mn></mtd></mtr></mtable></math>",
            r"$$\begin{matrix} 1 & 2 \\ 3 & 4 \end{matrix}$$",
        ),
        ("<math><semantics><mi>q</mi><annotation encoding='application/x-tex'>\\hat{q}_1</annotation></semantics></math>", r"$\hat{q}_1$"),
        ("<math><mover accent='true'><mi>x</mi><mo>¯</mo></mover><mover><mi>y</mi><mi>n</mi></mover></math>", r"$\bar{x} y^{n}$"),
        ("<math><mi>f</mi><mfenced><mi>x</mi><mi>y</mi></mfenced><mtext>if</mtext></math>", r"$f (x, y) \text{if}$"),
        ("<script type='math/tex; mode=display'>x^2 + y_1^2</script>", "$$x^2 + y_1^2$$"),
        ("<span class='MathJax_Preview'>x2</span><script type='math/tex'>x^2</script>", "$x^2$"),
        ("<img class='math' src='m.png' alt='2^{walign}'>", "$2^{walign}$"),
        ("<img src='m.png' alt='\\(\\alpha_1\\)'>", r"$\alpha_1$"),
        (
            "<span class='mwe-math-element'><span style='display: none'><math alttext='{\\displaystyle E}'><mi>E</mi></math></span>"
            "<img class='mwe-math-fallback-image-inline' alt='{\\displaystyle E=mc^{2}}'></span>",
            "$E=mc^{2}$",
        ),
        (
            "<span class='katex'><span class='katex-mathml'><math><semantics><mi>z</mi>"
            "<annotation encoding='application/x-tex'>z_{1}</annotation></semantics></math></span>"
            "<span class='katex-html'>z1</span></span>",
            "$z_{1}$",
        ),
    ],
)
def test_formulas_become_tex_once(markup, tex):
    assert html_to_text(f"<article><p>Here {markup} it is.</p></article>").split() == ["Here", *tex.split(), "it", "is."]


def test_a_tables_row_is_a_line():
    row = "<tr><td><p>{}</p></td><td>{}</td><td><p>{} <b>is</b></p></td></tr>"
    text = html_to_text(f"<article><p>Sizes.</p><table>{row.format(1, 2, 'three')}{row.format(4, 5, 'six')}</table></article>")
    assert [line.split() for line in text.split("\n") if line] == [["Sizes."], ["1", "2", "three", "is"], ["4", "5", "six", "is"]]


def test_alt_texts_of_pictures_stay_and_those_of_logos_go():
    page = '<article><p>See.</p><img src="p.png" alt="A diagram of the pump"><p><a href="/"><img src="l.png" alt="Logo"></a></p></article>'
    assert html_to_text(page) == "See.\n\nA diagram of the pump"


@pytest.mark.parametrize(
    "line, plain",
    [
        ("## A heading ##", "A heading"),
        ("**bold** and *slanted* and ***both***", "bold and slanted and both"),
        ('a [link](http://x.y/a_(b)) and ![picture](p.png "t")', "a link and picture"),
        ("- an item", "an item"),
        ("> quoted", "quoted"),
        ("with `code` here", "with code here"),
        ("---", ""),
        ("```python", ""),
        (
            "2 * 3 * 4, a*b*c, snake_case_name, __init__.py?, 5 > 4, C# and #1",
            "2 * 3 * 4, a*b*c, snake_case_name, __init__.py?, 5 > 4, C# and #1",
        ),
        ("-5 degrees", "-5 degrees"),
    ],
)
def test_markdown_markers_go_and_their_look_alikes_stay(line, plain):
    assert without_markdown(line) == plain


def test_reasons():
    assert judge(ExtractHtml(), "<html><body><nav><a href='/'>Home</a></nav></body></html>")[0] == "no_content"
    assert judge(ExtractHtml(), "")[0] == "no_content"
    assert judge(ExtractHtml(min_characters=50), "<article><p>Short.</p></article>")[0] == "no_content"
    assert judge(ExtractHtml(), "<div>" * 3000 + "deep")[0] == "unreadable_html"
    reason, doc = judge(ExtractHtml(), "<article><p>Kept &amp; clean.</p></article>")
    assert reason is None
    assert doc.text == "Kept & clean."


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("<>/ap!-=\"'&; \n\x00é数prescodmathdiv"), max_size=200))
def test_no_page_is_fatal(page):
    judge(ExtractHtml(), page)
