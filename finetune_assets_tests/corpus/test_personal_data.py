"""What the recognisers find and leave alone, placeholders of a conversation, ids, speed, and recall on the planted values."""

import random
import re
import time
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import privacy
from finetune_assets.corpus import personal_data as pd
from finetune_assets.corpus.names import _CALLER, _INTRO
from finetune_assets.corpus.phones import _MONEY, _ORDER_WORD, _PHONE_WORD, has_phone
from finetune_assets.corpus.recognisers import small

SGD = Path(__file__).parents[3] / "shared" / "data" / "sgd"
SAMPLE = Path(__file__).parents[2] / "data" / "sample"
KEY = b"a key"

FOUND = [
    ("escribe a ana.perez+1@correo.example.org.", "email", "ana.perez+1@correo.example.org"),
    ("juan arroba gmail punto com", "email", "juan arroba gmail punto com"),
    ("tarjeta 4647 0059 5069 5213 vence 12/27", "credit_card", "4647 0059 5069 5213"),
    ("mi IBAN: ES91 2100 0418 4502 0005 1332 gracias", "iban", "ES91 2100 0418 4502 0005 1332"),
    ("gb82west12345698765432", "iban", "gb82west12345698765432"),
    ("Mi DNI es 12345678Z.", "national_id", "12345678Z"),
    ("NIE X1234567L", "national_id", "X1234567L"),
    ("BOXW310820HNERXN09", "national_id", "BOXW310820HNERXN09"),
    ("rut 12.345.678-5", "national_id", "12.345.678-5"),
    ("mi DNI es 30.123.456", "national_id", "30.123.456"),
    ("CUIT 20-05536168-2", "national_id", "20-05536168-2"),
    ("mi CI es 4567890 LP", "national_id", "4567890 LP"),
    ("cédula de identidad: 4567890-1K", "national_id", "4567890-1K"),
    ("MI CÉDULA ES 4567890", "national_id", "4567890"),
    ("IDENTIFICACIÓN: 4567890-1K", "national_id", "4567890-1K"),
    ("desde 25.191.86.224, creo", "ip", "25.191.86.224"),
    ("2001:db8::ff00:42:8329", "ip", "2001:db8::ff00:42:8329"),
    ("my key sk-ODBZibEzqBMNwsMR5zAahiaC1EDOCsb7", "secret", "sk-ODBZibEzqBMNwsMR5zAahiaC1EDOCsb7"),
    ("AKIAIOSFODNN7EXAMPLE", "secret", "AKIAIOSFODNN7EXAMPLE"),
    ("Authorization: Bearer abcdef123456789", "secret", "abcdef123456789"),
    ("mi contraseña es hunter2.", "secret", "hunter2"),
    ("api key: 9f86d081884c7d65", "secret", "9f86d081884c7d65"),
    ("entra en https://x.example/reset?token=abcd1234, ya", "url", "https://x.example/reset?token=abcd1234"),
    ("llámame al +591 701-23456", "phone", "+591 701-23456"),
    ("Their number is 408-739-6520", "phone", "408-739-6520"),
    ("at 1760 415-771-2216", "phone", "415-771-2216"),
    ("71234567", "phone", "71234567"),
    ("Me pueden llamar al +54 9 11 3677-5323", "phone", "+54 9 11 3677-5323"),
    ("612 34 56 78", "phone", "612 34 56 78"),
    ("mi cel 7 123 4567", "phone", "7 123 4567"),
    ("https://wa.me/59170123456", "phone", "59170123456"),
    ("hola, me llamo Ana Pérez y quiero hora", "name", "Ana Pérez"),
    ("me llamo ana perez quiero una cita", "name", "ana perez"),
    ("ME LLAMO ANA PEREZ", "name", "ANA PEREZ"),
    ("Soy María de la Cruz, paciente", "name", "María de la Cruz"),
    ("a nombre de mi hermana Lucía", "name", "Lucía"),
    ("I am Sarah Connor", "name", "Sarah Connor"),
    ("meu nome é João da Silva", "name", "João da Silva"),
]
CLEAN = """abierto de 10:30 a 20:00
horario 8.30-12.30 y 14.00-18.30
el 2026-10-25 a las 15:30
25/10/2026 10:30
nacido 25-10-2026, 31.01.1990
cuesta 12.500 pesos, 1500 pesos, 12.500.000
total 70123456 bs
mi número de pedido es 71234567
la versión 1.2.3.4
el código postal es 28013 o 94102-1234
entre 2000-3000
a la 1 2 3 4 5 6 7 8
tarjeta 4647 0059 5069 5214
la clave es reservar antes
el token es necesario
https://clinica.example/citas?fecha=2026-10-25
soy alérgico a la penicilina
SOY ALERGICA A LA PENICILINA
Soy Nuevo, soy paciente, soy de La Paz
¿a nombre de quién?
a nombre de la empresa
Hola, soy el asistente virtual
I'm Looking for a dentist
my name is not important
add it under the name dentist
uuid 123e4567-e89b-12d3-a456-426614174000
coordenadas -16.500000, -68.150000
2434 Almaden Road # 212""".splitlines()


@pytest.mark.parametrize(("text", "kind", "value"), FOUND)
def test_finds(text: str, kind: str, value: str) -> None:
    assert [(f.kind, f.value) for f in pd.find(text)] == [(kind, value)]
    assert pd.needs_look(pl.Series([text])).all()
    assert pd.residual([text, "hola"]) == {kind: 1}


@pytest.mark.parametrize("text", CLEAN)
def test_leaves_alone(text: str) -> None:
    assert pd.find(text) == []


def test_same_value_same_placeholder() -> None:
    texts = ["ana@x.example y leo@x.example", "Anotado ANA@x.example", "tel +34 615 957 795", "el 615957795 y el 612 345 678"]
    scrubbed, counts = pd.scrub_conversation(texts)
    assert scrubbed == ["[EMAIL] y [EMAIL_2]", "Anotado [EMAIL]", "tel [PHONE]", "el [PHONE] y el [PHONE_2]"]
    assert counts == {"email": 3, "phone": 3}


def test_a_value_is_replaced_where_nothing_introduces_it() -> None:
    scrubbed, _ = pd.scrub_conversation(
        ["mi contraseña es hunter2", "anoté hunter2", "mi CI es 4567890 LP", "4567890LP, ¿verdad?"]
    )
    assert scrubbed == ["mi contraseña es [SECRET]", "anoté [SECRET]", "mi CI es [NATIONAL_ID]", "[NATIONAL_ID], ¿verdad?"]


def test_names_go_everywhere_but_common_words_stay() -> None:
    texts = ["Hola", "Me llamo Rosa Pérez", "Gracias, ROSA. ¿La señora Perez quiere una rosa?", "Rosa: color rosa", "[NAME_4]"]
    scrubbed, counts = pd.scrub_conversation(texts)
    name = "[NAME_5]"  # [NAME_4] is taken
    assert scrubbed[1:4] == [f"Me llamo {name}", f"Gracias, {name}. ¿La señora {name} quiere una rosa?", f"{name}: color rosa"]
    assert counts["name"] == 4


ASKED = [
    ("¿Cuál es tu nombre completo, para la cita?", "Ana Pérez", "[NAME]"),
    ("Listo, ¿a nombre de quién?", "Sí, María de la Cruz, gracias 🙏", "Sí, [NAME], gracias 🙏"),
    ("¿con qué nombre registro la reserva?", "A nombre de la señora Pérez.", "A nombre de la señora [NAME]."),
    ("¿Me decís el nombre para cancelar la cita?", "Inés", "[NAME]"),
    ("Necesito tu nombre y tu correo", "ANA PEREZ", "[NAME]"),
    ("¿Tu nombre y apellido?", "Ana Bueno", "[NAME]"),
    ("¿Cómo te llamás?", "Ana Pérez", "[NAME]"),
    ("Your name, please?", "John O'Connor", "[NAME]"),
    ("May I have your full name?", "It's Sarah", "It's [NAME]"),
    ("Qual é o seu nome?", "João da Silva", "[NAME]"),
    ("Qual é o seu nome completo, por favor?", "Pedro Lima, quero na terça", "[NAME], quero na terça"),
    ("¿A nombre de quién?", "ana pérez", "[NAME]"),
    ("A agendar em nome de quem?", "joão silva", "[NAME]"),
    ("¿A nombre de quién?", "maria de la cruz, gracias", "[NAME], gracias"),
    ("¿A nombre de quién?", "Lucía y seremos dos", "[NAME] y seremos dos"),
    ("Your name, please?", "sarah connor - two people", "[NAME] - two people"),
]
NOT_ASKED = [
    ("¿A nombre de quién?", "Claro"),
    ("¿A nombre de quién?", "Muchísimas gracias"),
    ("¿A nombre de quién?", "CANCELAR"),
    ("¿A nombre de quién?", "¿Ana Pérez?"),
    ("¿A nombre de quién?", "Ana Pérez llamó ayer"),
    ("¿A nombre de quién?", "[NAME]"),
    ("¿A nombre de quién?", "limpieza dental, por favor"),
    ("¿A nombre de quién?", "Limpieza, quiero pedir cita"),
    ("¿A nombre de quién?", "el mismo, gracias"),
    ("¿A nombre de quién?", "Perfecto, mañana a las 5"),
    ("Anotado a nombre de la empresa.", "Ana Pérez"),
    ("What is the name of the restaurant?", "Bon Appetit"),
    ("What name should I use for the event?", "Dental Appointment"),
    ("¿En qué ciudad?", "Buenos Aires"),
]


@pytest.mark.parametrize(("question", "answer", "scrubbed"), ASKED)
def test_a_bare_name_answers_a_question(question: str, answer: str, scrubbed: str) -> None:
    texts = ["Hola", question, answer]
    assert pd.scrub_conversation(texts) == (["Hola", question, scrubbed], {"name": 1})
    assert pd.needs_look(pl.Series(texts)).any()
    name = answer.removeprefix(scrubbed.partition("[")[0]).removesuffix(scrubbed.partition("]")[2])
    assert pd.scrub_conversation(texts, allow=frozenset({name})) == (texts, {})


@pytest.mark.parametrize(("question", "answer"), NOT_ASKED)
def test_no_bare_name(question: str, answer: str) -> None:
    assert pd.scrub_conversation([question, answer]) == ([question, answer], {})
    assert pd.scrub_conversation([answer, question]) == ([answer, question], {})


def test_a_title_before_a_placeholder_is_no_name() -> None:
    texts = ["A nombre de la señora Pérez", "Gracias, señora. ¿Y su esposo?", "me llamo don Luis"]
    assert pd.scrub_conversation(texts)[0] == ["A nombre de la señora [NAME]", texts[1], "me llamo don [NAME_2]"]


def test_a_bare_name_goes_from_the_other_texts_too() -> None:
    texts = ["¿Cómo te llamas?", "Ana Pérez", "Gracias, Ana. ¿Tu nombre y apellido son ana perez?", "Correcto"]
    scrubbed, _ = pd.scrub_conversation(texts)
    assert scrubbed == [texts[0], "[NAME]", "Gracias, [NAME]. ¿Tu nombre y apellido son [NAME]?", "Correcto"]


def test_allow_list_compares_normalised() -> None:
    texts = ["Llama al (415) 493-4365 o escribe a Citas@clinica.example"]
    assert pd.scrub_conversation(texts, allow=frozenset({"+1 415 493 4365", "citas@CLINICA.example"})) == (texts, {})
    assert pd.residual(texts) == {"phone": 1, "email": 1}


pieces = st.sampled_from(
    [
        *(t for t, _, _ in FOUND),
        *CLEAN,
        "[NAME]",
        "[EMAIL_2]",
        "tel",
        "Ana",
        "pedido",
        "¿Tu nombre?",
        "Sí,",
        "Pérez",
        "Soy la señora",
        "\x00",
        "\ud800",
        "🙂",
        " ",
        ".",
    ]
)
message = st.lists(pieces | st.text(st.characters(), max_size=8) | st.from_regex(r"\A[0-9 +().@:-]{1,20}\Z"), max_size=6).map(
    " ".join
)


@settings(max_examples=200, deadline=None)
@given(st.lists(message, max_size=4))
def test_scrubbing_twice_changes_nothing(texts: list[str]) -> None:
    scrubbed, _ = pd.scrub_conversation(texts)
    assert pd.scrub_conversation(scrubbed) == (scrubbed, {})
    assert not pd.residual(scrubbed)


@settings(max_examples=200, deadline=None)
@given(message)
def test_the_prefilter_and_the_places(text: str) -> None:
    found = pd.find(text)
    assert all(text[f.start : f.end] == f.value for f in found)
    assert all(a.end <= b.start for a, b in pairwise(found))
    if found and "\ud800" not in text and text.isprintable():
        assert pd.needs_look(pl.Series([text])).all()


def test_small_letters_are_those_that_ignorecase_takes_for_equal() -> None:
    for texts in ("".join(map(chr, range(0x110000))), "".join(map(chr, range(0x130))), "aßKſıσΣ \ud800"):
        low = small(texts)
        assert len(low) == len(texts)
        for one in [*"abcdefghijklmnopqrstuvwxyzñáéíóúàâãçêôõü", r"\w", r"\d", r"\s"]:
            equal = [m.start() for m in re.finditer(one, texts, re.IGNORECASE)]
            assert [m.start() for m in re.finditer(one, low)] == equal


@pytest.mark.parametrize("pattern", [_INTRO, _CALLER, _MONEY, _ORDER_WORD, _PHONE_WORD])
def test_what_is_looked_for_in_small_letters_is_written_in_small_letters(pattern: re.Pattern[str]) -> None:
    letters = re.sub(r"\\.|\(\?P", "", pattern.pattern)
    assert letters == small(letters)


def test_ids() -> None:
    plain = [
        "conv_000021",
        "msg_013454",
        "fb_000681",
        "123e4567-e89b-12d3-a456-426614174000",
        "a1b2c3d4e5f60718",
        "2026-10-25T10:30:00Z",
        "1234567890123456789",
        "conv_20261025_0001",
        "user_clinic_cumbre_194",
        "01ARZ3NDEKTSV4RRFFQ69G5FAV",
        "deadbeefcafe1234deadbeef",
    ]
    assert [pd.scrub_id(i, KEY) for i in plain] == plain
    for personal in [
        "conv_+59170123456_x",
        "user_59170123456",
        "5491123456789",
        "ana@x.example",
        "59170123456@c.us",
        "615957795",
    ]:
        hashed = pd.scrub_id(personal, KEY)
        assert hashed.startswith("p_")
        assert len(hashed) == 18
        assert pd.scrub_id(hashed, KEY) == hashed != pd.scrub_id(personal, b"another key")
    assert pd.pseudonym("59170123456", KEY) == pd.pseudonym("59170123456", KEY) != pd.pseudonym("59170123456", b"")
    assert pd.pseudonym("\ud800", KEY).startswith("u_")


def test_counted_ids_are_judged_as_all_recognisers_would() -> None:
    draw = random.Random(1)
    words = ["msg", "conv", "tel", "token", "pin", "sk", "rut", "ci", "call", "order", "es", "AKIA"]
    starts = ["", "34", "591", "00", "000", "1", "6", "41"]

    def group() -> str:
        return draw.choice(starts) + "".join(draw.choices("0123456789", k=draw.randint(1, 14)))

    ids = [draw.choice(words) + "".join(draw.choice("_-") + group() for _ in range(draw.randint(1, 3))) for _ in range(1500)]
    ids += [
        "x_4111111111111111",
        "x_4111_1111_1111_1111",
        "x_12345678-5",
        "123e4567-e89b-12d3-a456-426614174000",
        "2026-10-25T10:30",
    ]
    whole = [bool(has_phone(i, pd.DEFAULT_REGIONS) or pd.find(i) or pd.find(i.replace("_", " "))) for i in ids[:-2]]
    hashed = [pd.scrub_id(i, KEY) != i for i in ids]
    assert hashed == [*whole, False, False]
    assert 100 < sum(hashed) < 1400
    plain = pd.plain_ids(pl.Series(ids)).to_list()
    assert not any(form and personal for form, personal in zip(plain, hashed, strict=True))
    assert plain[-2:] == [True, True]


@pytest.mark.parametrize(
    "unit",
    ["a.", "1 ", "612345678 ", "a@", "me llamo ", "1.2.", "?token=", "::", "600 600 ", "[NAME]", "-----BEGIN A PRIVATE KEY-----"],
)
def test_a_long_text_takes_linear_time(unit: str) -> None:
    took = []
    for size in (50_000, 200_000):
        start = time.process_time()
        pd.find((unit * (size // len(unit) + 1))[:size])
        took.append(time.process_time() - start)
    assert took[1] < 2
    assert took[1] < 10 * took[0] + 0.5
    assert pd.scrub_conversation([]) == ([], {})


@pytest.mark.parametrize("folder", [SGD, SAMPLE], ids=["sgd", "sample"])
def test_planted_values_are_found_and_clean_messages_stay(folder: Path) -> None:
    if not (folder / "truth.json").exists() or not (folder / "messages.parquet").exists():
        pytest.skip(f"no truth.json and messages.parquet in {folder.name}")
    figures = privacy.export_figures(folder)
    assert figures.planted.total() > 100
    assert figures.recall >= 0.99, figures.missed
    assert figures.clean > 10_000
    assert figures.needless_share < 0.005, figures.needless


def test_texts_in_many_forms() -> None:
    figures = privacy.case_figures()
    assert figures.missed == []
    assert figures.needless == []
    assert figures.planted.total() >= 280
    assert figures.clean >= 300
    assert figures.right.total() >= 0.98 * figures.planted.total()  # of the right kind
