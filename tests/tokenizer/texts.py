"""Real sentences in ten languages, code, and strings made to trip a tokenizer."""

SENTENCES = {
    "english": "The licence doesn't cover what you've built; they'll say it's 1,234,567.89 dollars, won't they?",
    "german": "Die Größe des Ärmelkanals überrascht: Straßenbahnfahrer müssen übermäßig früh aufstehen.",
    "french": "L'été dernier, nous avons mangé des crêpes à la crème brûlée près de l'hôtel, n'est-ce pas ?",
    "spanish": "¿Cuántos años tenía el niño cuando llegó? ¡Mañana será otro día en España!",
    "portuguese": "A informação não é só para os cidadãos; amanhã haverá pão, maçãs e café.",
    "italian": "Perché non c'è più caffè? La città è già piena di gente, e l'università è chiusa.",
    "hindi": "नमस्ते दुनिया! क्या आप हिन्दी में पढ़ सकते हैं? यह १२३४५६ रुपये का है।",
    "thai": "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่างระหว่างคำ ๑๒๓๔",
    "chinese": "北京是中华人民共和国的首都。今天天气很好,我们去公园吧!共有12345人。",
    "japanese": "吾輩は猫である。名前はまだ無い。カタカナとひらがな、そして漢字が混ざっています。",
    "arabic": "مرحبا بالعالم! كيف حالك اليوم؟ لديّ ١٢٣ كتابًا.",
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю — 2024 год.",
    "korean": "안녕하세요 세계! 오늘 날씨가 정말 좋네요. 3.14159는 원주율입니다.",
}
CODE = {
    "python": "def f(x: int) -> str:\n    # TODO's\n\treturn f'{x:>10}' if x != 0 else \"\"\r\n\n\n    class A: pass\n",
    "c": '#include <stdio.h>\nint main(void) {\n    for (int i = 0; i < 100000; ++i) printf("%d\\n", i);\n}\n',
    "html": '<!DOCTYPE html>\n<a href="https://example.org/?q=1&amp;r=2">caf&eacute;</a>   \n\n',
    "latex": "\\begin{equation}\n  e^{i\\pi} + 1 = 0 \\label{eq:euler}\n\\end{equation}\n",
}
NASTY = {
    "blank": "   \n \t \r\n\r\n  ",
    "contractions": "I'M he'Ll we'RE ſ'ſ it's'S 'd'D K'S",
    "emoji": "👨‍👩‍👧‍👦🇩🇪🏳️‍🌈 ok👍🏽",
    "combining": "e\u0301 \u0928\u093f \u200b\ufeff\u00a0x\u3000y\u2028z\x85",
    "digits": "1 12 123 1234 12345678901 ²³ Ⅷ ٣٤٥ 1٣2",
    "controls": "\x00\x01\x1b[0m\x7f",
    "specials": "a<|eot_id|>b <|begin_of_text|><|end_of_text|> <|reserved_special_token_7|> <|nonsense|>",
    "astral": "𝕳𝖊𝖑𝖑𝖔 𠜎𠜱 𐍈",
}
ALL = {**SENTENCES, **CODE, **NASTY}
