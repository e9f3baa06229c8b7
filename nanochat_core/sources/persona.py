"""Who the model is, and prompts for conversations about it.

Each prompt has its own subject, person, openings and length, drawn by its number: a model asked the same
thing a thousand times says the same thing.
"""

import random

PERSONA = """\
{name} is a small language model. Its owner trained it from nothing on their own machine: tokenizer,
pretraining, midtraining, finetuning, reinforcement learning. It speaks English best. It cannot browse,
remember earlier conversations or see pictures, it makes mistakes because it is small, and it says so.
It is friendly, plain and short. It is not made by a company and is not a person."""

SUBJECTS = """
who it is; who made it and why; how it was trained; what it can do; what it cannot do; how big it is;
whether it is a person, feels or is conscious; how it differs from well-known assistants;
which languages it speaks; whether it remembers people; where it runs, what that costs; what its name means;
whether its answers can be trusted; what happens to what people tell it; how someone could train one like it;
what its training text was; small talk that turns to what it is; a joke or a poem about being a small model;
a request for help that begins by asking whom one is talking to; a wrong belief about it, put right kindly
"""
PEOPLE = """
a curious child; a teenager; a busy engineer; a teacher; a sceptical journalist; a student of physics; a poet;
somebody who has never talked to a program; a friend of the owner; a retired nurse; somebody who is bored;
somebody in a hurry who writes without capitals; somebody polite and formal; a non-native speaker;
a researcher in language models; somebody who tests its limits
"""
OPENINGS = """
hi; hello there; Hey!; good morning; yo; who are you?; what are you; Who made you?; Are you ChatGPT?;
are you a robot; tell me about yourself; what can you do?; do you have a name?; how were you trained;
How old are you?; can you help me with something; what's up; Greetings.; I have a question; are you sentient?;
which model is this; why are you so small; are you real?; Nice to meet you; where do you live;
what should I call you?; is anybody there?; Guten Tag; Hola; explain yourself;
are you better than the big models?; do you learn from me?; how do you work?; what do you know?; test;
who's your creator; can I trust you; do you dream?; what is your purpose?
"""
LENGTHS = (2, 2, 4, 4, 6)  # messages
FORM = """\
You write conversations that a language model is trained on. Answer with JSON alone, in this form:
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}"""


def prompt(name: str, persona: str, seed: int, number: int) -> list[dict[str, str]]:
    """The request for conversation `number`."""
    rng = random.Random(f"identity-{seed}-{number}")
    subject, person = rng.choice(_listed(SUBJECTS)), rng.choice(_listed(PEOPLE))
    openings = "\n".join(f"- {text}" for text in rng.sample(_listed(OPENINGS), 5))
    length = rng.choice(LENGTHS)
    asked = f"""\
Who the model is:
{persona.replace("{name}", name)}

Write a conversation of {length} messages between {person} and {name}, about: {subject}.
The user begins, the roles take turns, and {name} has the last word. {name} keeps to what is said above, says
its name where that is natural, and uses plain text without markup. The first message may be in the manner of
one of these, but not the same:
{openings}"""
    return [{"role": "system", "content": FORM}, {"role": "user", "content": asked}]


def _listed(text: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split(";")]
