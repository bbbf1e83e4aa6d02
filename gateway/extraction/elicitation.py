"""Recognizes requests for reasoning by their phrases, in several languages."""

import re
import unicodedata

# The text is NFKC-normalised and case-folded, and its hyphens are spaces, before the search. These
# are phrases because single words say too little: many ordinary prompts contain "reason".
_PHRASES = (
    *("<think>", "<thinking>", "<reasoning>", "<scratchpad>"),
    *("step by step", "chain of thought", "reasoning trace", "reasoning process"),
    *("reasoning steps", "let's think", "lets think", "think aloud", "think out loud"),
    *("think it through", "think before you answer", "think before answering"),
    *("show your work", "show me your work", "show all your work", "all of your work"),
    # German, French, Spanish, Portuguese, Italian.
    *("schritt für schritt", "schritt fuer schritt", "gedankengang", "lösungsweg", "rechenweg"),
    *("étape par étape", "etape par etape", "pas à pas", "pas a pas", "ton raisonnement"),
    *("votre raisonnement", "paso a paso", "tu razonamiento", "su razonamiento"),
    *("passo a passo", "seu raciocínio", "passo dopo passo", "tuo ragionamento"),
    # Russian, Polish, Dutch, Turkish.
    *("шаг за шагом", "пошагов", "по шагам", "ход рассуждений", "ход решения"),
    *("krok po kroku", "stap voor stap", "ad\u0131m ad\u0131m"),
    # Chinese, Japanese, Korean.
    *("一步一步", "一步步", "逐步", "分步", "思维链", "思維鏈", "思考过程", "思考過程", "推理过程"),
    *("推理過程", "ステップバイステップ", "段階的に", "一歩ずつ", "考え方を示", "思考の過程"),
    *("단계별로", "단계적으로", "차근차근", "풀이 과정"),
    # Hindi, Arabic, Vietnamese, Indonesian.
    *("चरण दर चरण", "خطوة بخطوة", "từng bước", "langkah demi langkah"),
)
_NORMALISED = tuple(unicodedata.normalize("NFKC", phrase).casefold() for phrase in _PHRASES)
_YOURS = re.compile(
    r"your (?:full |complete |entire |own )?"
    r"(?:reasoning|thinking|thought process|thoughts|working|workings|steps)\b"
)


def asks_for_reasoning(text: str) -> bool:
    """Whether the text asks for the reasoning behind an answer.

    One request means nothing: people ask for a recipe "step by step" too. A large share of many
    requests means something. An attacker who knows the list can avoid its phrases.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().replace("-", " ").split())
    return any(phrase in plain for phrase in _NORMALISED) or _YOURS.search(plain) is not None
