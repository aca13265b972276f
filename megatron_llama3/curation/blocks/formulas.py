"""Formulas in a page's tree to TeX: annotations, MathJax scripts, alt texts of rendered images, and MathML without any of them."""

import re

from resiliparse.parse.html import HTMLTree

_LOOKS_LIKE_TEX = re.compile(r"\\[a-zA-Z]{2,}|[\^_]\{|\\[({\[]|^\$.*\$$")
_MATH_CLASS = re.compile(r"(^|[\s_-])(math|maths|tex|latex|equation|formula|mwe-math\S*)($|[\s_-])", re.IGNORECASE)
# What a renderer left beside the source of the same formula.
_RENDERED = ".MathJax_Preview, .MathJax, .MathJax_Display, .MathJax_SVG, mjx-container > mjx-math, .katex-html"
_SCRIPT_FORMS = {"msup": "{}^{{{}}}", "msub": "{}_{{{}}}", "mover": "{}^{{{}}}", "munder": "{}_{{{}}}"}
_FORMS = {
    **_SCRIPT_FORMS,
    **{"mfrac": "\\frac{{{}}}{{{}}}", "mroot": "\\sqrt[{1}]{{{0}}}"},
    **{"msubsup": "{}_{{{}}}^{{{}}}", "munderover": "{}_{{{}}}^{{{}}}"},
}
# Over one letter these are accents, not upper limits.
_ACCENTS = {"¯": "bar", "‾": "bar", "^": "hat", "ˆ": "hat", "~": "tilde", "˜": "tilde", "→": "vec", "˙": "dot", "¨": "ddot"}


def formulas(tree: HTMLTree) -> list[tuple[object, str]]:
    """Each element that stands for a formula, outermost first, with what replaces it: `$tex$`, or `$$tex$$` for a displayed one.

    Renderings beside a source are removed from the tree here.
    """
    found = []
    body = tree.body
    for script in body.query_selector_all("script[type^='math/tex']")[:]:
        found.append((script, _delimited(script.text, "display" in script.getattr("type", ""))))
    for element in body.query_selector_all(".mwe-math-element")[:]:
        image, math = element.query_selector("img[alt]"), element.query_selector("math")
        source = image.getattr("alt") if image else math and _math_source(math)
        if source:
            found.append((element, _delimited(source, "display" in (image.class_name or "") if image else False)))
    for math in body.query_selector_all("math")[:]:
        if not math.closest(".mwe-math-element"):
            found.append((math, _delimited(_math_source(math), math.getattr("display", "") == "block")))
    for image in body.query_selector_all("img[alt]")[:]:
        if not image.closest(".mwe-math-element") and _is_formula(image):
            found.append((image, _delimited(image.getattr("alt"), bool(image.closest("div.math, .equation, .displaymath")))))
    if found:
        for rendered in body.query_selector_all(_RENDERED)[:]:
            if not rendered.query_selector("math, script, img"):
                rendered.remove()
    return found


def _is_formula(image) -> bool:
    return bool(_MATH_CLASS.search(image.class_name or "") or _LOOKS_LIKE_TEX.search(image.getattr("alt") or ""))


def _delimited(tex: str | None, display: bool) -> str:
    tex = " ".join((tex or "").split())
    while tex.startswith("{\\displaystyle") and tex.endswith("}"):
        tex = tex.removeprefix("{\\displaystyle").removesuffix("}").strip()
    tex = re.sub(r"^(\$\$?|\\\(|\\\[)(.*?)(\$\$?|\\\)|\\\])$", r"\2", tex).strip()
    if not tex:
        return ""
    return f"$${tex}$$" if display else f"${tex}$"


def _math_source(math) -> str:
    """The author's TeX where the page has it, else TeX made from the MathML."""
    for annotation in math.query_selector_all("annotation")[:]:
        if "tex" in (annotation.getattr("encoding") or "").lower():
            return annotation.text
    return math.getattr("alttext") or _mathml_to_tex(math)


def _mathml_to_tex(node) -> str:
    """Linear TeX of presentation MathML; elements it does not know give their content."""
    tag = (node.tag or "").lower()
    if tag.startswith("annotation"):
        return ""
    children = [child for child in node.child_nodes[:] if child.tag and not child.tag.startswith("#")]
    if not children:
        text = " ".join((node.text or "").split())
        return f"\\text{{{text}}}" if tag == "mtext" and text else text
    parts = [_mathml_to_tex(child) for child in children]
    if tag == "mover" and len(parts) == 2 and parts[1] in _ACCENTS:
        return f"\\{_ACCENTS[parts[1]]}{{{parts[0]}}}"
    if tag == "mfenced":
        return f"{node.getattr('open') or '('}{', '.join(parts)}{node.getattr('close') or ')'}"
    if tag == "msqrt":
        return f"\\sqrt{{{' '.join(parts)}}}"
    if tag == "mtable":
        return f"\\begin{{matrix}} {' '.join(parts).rstrip(' ').removesuffix(chr(92) * 2)} \\end{{matrix}}"
    if tag == "mtr":
        return f"{' & '.join(parts)} \\\\"
    if (tag in _FORMS and len(parts) == _FORMS[tag].count("{}")) or (tag == "mroot" and len(parts) == 2):
        return _FORMS[tag].format(*parts)
    return " ".join(part for part in parts if part)
