"""Names that somebody introduces ("me llamo Ana Pérez") or gives when asked for one, and the words that are no names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from finetune_assets.corpus.recognisers import END, GAP, START, Span, small

MAX_ANSWER = 100  # characters of a text that may be a name and nothing else

_I = re.IGNORECASE


def blanks(pattern: str) -> str:
    """The pattern with one to three blanks wherever it has one."""
    return pattern.replace(" ", r"[ \t\u00a0]{1,3}")


# Plain alternatives without look-around: `personal_data.LOOK` takes them up, for Polars. A blank stands for one to three.
# After a strong introduction a name may be in lower case, after a weak one not.
STRONG_INTRO = blanks(
    r"me llamo|mi nombre(?: completo)? es|a nombre de|my (?:full )?name(?: is|'s|’s)|meu nome (?:completo )?[ée]|me chamo"
)
_KIN = (
    r"hij[oa]|espos[oa]|marido|mujer|madre|padre|mam[aá]|pap[aá]|herman[oa]|suegr[oa]|niet[oa]|t[ií][oa]|abuel[oa]|novi[oa]|"
    r"pareja|amig[oa]|prim[oa]|sobrin[oa]"
)
_KIN_EN = r"son|daughter|wife|husband|mother|father|mom|dad|brother|sister|friend|partner|boyfriend|girlfriend"
_KIN_PT = r"filh[oa]|espos[oa]|marido|mulher|m[ãa]e|pai|irm[ãa]o?|amig[oa]|namorad[oa]|av[óô]"
WEAK_INTRO = blanks(
    rf"under the name(?: of)?|in the name of|soy (?:la|el) (?:{_KIN}) de|para (?:el|la) niñ[oa]|soy|"
    r"[lt]es? (?:habla|saluda|escribe)|i am|i'm|i’m|sou(?: [oa])?|em nome d[aeo]|"
    rf"(?:de|para|es|con) mi (?:{_KIN})|for my (?:{_KIN_EN})|(?:para|é) (?:o meu|a minha|meu|minha) (?:{_KIN_PT})|"
    r"mis? apellidos? (?:es|son)|the (?:last |first )?name is|(?:it's|it’s|it is|reservation|booking|table|appointment) under"
    r"(?: the name(?: of)?)?|"
    r"for (?:mr|mrs|ms|miss)\.?|aqui (?:é|fala)(?: [oa])?|"
    r"saludos,|atentamente,|atte\.?,?|firmado:?|un saludo,"
)
LABEL = blanks(
    r"(?:nombres?|apellidos?|name|nome|sobrenome|firma|titular|paciente|client[e]?|a nombre de|huésped|guest|patient)"
    r"(?: completo| y apellidos?| e sobrenome| del? (?:paciente|titular|cliente))?"
)
"""Of a form: a name with capitals after it and a colon."""
_ASKING = (
    r"(?:me|nos) (?:[a-zñáéíóú]{2,12} ){1,2}|[a-zñáéíóú]{1,12}(?:me|nos) |necesit(?:o|amos) |"
    r"(?:cu[aá]l|qual) (?:es |ser[ií]a |[eé] )?"
)
ASK_NAME = (
    rf"(?:{_ASKING})(?:(?:tu|su|o seu|seu) nom(?:br)?e|el nombre (?:completo|con el que|para|y|del titular|del paciente))|"
    r"(?:tu|su|seu) nom(?:br)?e(?: completo)?(?:\?|,? por favor)|nombre y apellidos?|nome e sobrenome|"
    r"(?:a|em) nom(?:br)?e de qui?[eé][nm]|(?:a|con|bajo|em|com) qu[eé] nom(?:br)?e|nom(?:br)?e para (?:la|el|a|o) [a-z]{4,8}\?|"
    r"c[oó]mo (?:te llam[aá]s|se llama(?: usted)?\?|(?:voc[eê] )?se chama)|"
    r"(?:what(?:'s|’s| is)|have|get|know|need|give me|tell me|confirm) your (?:full |first |last )?name|"
    r"your (?:full |first |last )?name(?:\?|,? please)|(?:whose|under what|under which) name|"
    r"name for the (?:reservation|booking|appointment)"
)
ASK_SIGN = "nom(?:br)?e|name|llam|chama"
"""Whatever asks for a name holds one of these."""
_ASK_NAME = re.compile(ASK_NAME, _I)

_WORD = r"[^\W\d_][^\W\d_'’-]{0,30}(?:['’-][^\W\d_]{1,30}){0,2}"
_TITLE_WORD = (
    r"(?:señora?|sra?|srta|niñ[oa]|don|doña|dra?|doctora?|mr|mrs|ms|miss|seu|dona|paciente|client[e]?|"
    r"espos[oa]|herman[oa]|hij[oa]|madre|padre|mam[aá]|pap[aá])\.?"
)
_TITLE = rf"(?:(?:el|la|mi){GAP}(?=\w))?(?:{_TITLE_WORD}{GAP})?"
_ONLY_ARTICLE = re.compile(rf".*(?:{GAP}|:)(?:el|la|mi){GAP}", _I | re.DOTALL)
_NAME_WORD = re.compile(_WORD)
_INTRO = re.compile(  # of `small` texts, as the next one
    rf"{START}(?P<intro>(?P<strong>{STRONG_INTRO})|{WEAK_INTRO}|(?:{LABEL}){GAP}?(?=:))(?:{GAP}|:){{1,3}}"
    rf"{_TITLE}(?!{_TITLE_WORD}{GAP}\n)(?P<name>{_WORD}(?:{GAP}{{1,2}}{_WORD}){{0,7}})"  # no name: title, placeholder
)
_CALLER = re.compile(
    rf"(?:^|[.,;!¡\n]|hola|hello|hi){GAP}*(?:(?P<here>aqu[ií])|this{GAP}is|habla){GAP}{{1,3}}"
    rf"(?P<name>{_WORD}(?:{GAP}{{1,2}}{_WORD}){{0,4}}){GAP}*(?P<end>[,.;!?¿¡:\n]|$|speaking|calling|from)"
)
"""Who says at the beginning who is there: "Hola, aquí Laura, …", "This is Sarah Connor."."""
_ANSWER = re.compile(
    rf"[^\w?¿\[]*(?:(?:s[ií]|claro|yes|sure|sim)[^\w?¿\[]{{1,3}})?(?:(?:soy|es|a nombre de|it'?s|sou){GAP})?"
    rf"{_TITLE}(?P<name>{_WORD}(?:{GAP}{{1,2}}{_WORD}){{0,7}})",
    _I,
)
_ANSWER_END = re.compile(r"[^\w?¿]*(?:(?:(?:muchas )?gracias|por ?favor|please|thanks|thank you|obrigad[oa])[^\w?¿]*)?", _I)

_MORE = re.compile(rf"{GAP}*(?:[,.;:!\n(–-]|[\d\[+]|(?:y|e|and|con|tel|mi|my|meu){GAP})", _I)
"""What may follow a name that begins an answer."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PARTICLES = _words("de del la las los da do das dos di van von y e san santa")
_PLACES = _words(
    "madrid barcelona santiago lima bogotá méxico bolivia chile argentina españa perú sucre cochabamba tarija oruro potosí"
)
_STOP = _words(
    """a al algo ahora porfa porfis plis pls xfa pf noche tarde alguien ante antes aqui aquí así aun aún bien buen buena buenas
buenos busco cada calle cita como cómo con cual cuál cuando cuenta cuándo cuanto cuánto debo desde deseo dice donde
dónde el él ella ellos en empresa entonces era eres es esa ese eso esta está este esto estoy favor gracias ha hace hago
hasta hay he hola hora hoy hable hablo la las le les llamo lo los lunes martes más mañana me mesa mi mis muchas muy nada
ni no nombre nos nosotros o otra otro para pero pido podría podrían puede pueden puedo por porque pues que qué quería
queria quien quién quiere quiero quisiera reserva reservar reservo sábado se ser si sí sin sobre solo sólo soy su sus
también tan te tengo tenía todo tu tú un una unas unos usted ustedes vengo vivo viernes voy vuestro y ya yo necesito
necesitaba escribo gustaría encantaría solicito agendar paciente cliente nuevo nueva alérgico alérgica alergico alergica
diabético diabética diabetico hipertenso hipertensa estudiante doctor doctora médico médica medico dentista enfermera
enfermero abogado abogada profesor profesora ingeniero ingeniera maestro maestra celíaco celíaca celiaco vegano vegana
vegetariano vegetariana intolerante mayor menor boliviano boliviana español española mexicano mexicana argentino
argentina chileno chilena peruano peruana colombiano colombiana extranjero extranjera turista residente embarazada
fumador fumadora jubilado jubilada titular socio socia hijo hija padre madre mamá papá esposo esposa hermano hermana
amigo amiga vecino vecina dueño dueña gerente asistente persona mujer hombre joven primera primerizo siempre capaz
consciente feliz fan usuario usuaria clínica clinica restaurante hotel banco bot ia virtual del asegurado asegurada
particular pendiente testigo zurdo puntual celiaca autónomo autónoma fontanero policía empleado empleada responsable
encargado encargada dentro fuera lista allí allá am an and are at be been but can currently do for from going good great
had has have here hi how i if in interested is it its just like looking mine my new not now of ok okay on only open or
our out please ready really sad so sorry still sure thank thanks that the their them then there they thinking this to
too trying under unable up us very wanting want was we well what when where which who will with would yes you your
afraid allergic also alone already available back both busy calling done fine free glad happy hungry late lost off over
planning running searching thirsty tired traveling travelling uncertain unsure using wondering american british spanish
english a.i ai curious excited booked reserved based certain correct right wrong vegan vegetarian celiac coeliac
pregnant diabetic gluten lactose nut veggie retired italian french german mexican chilean indian chinese japanese muslim
jewish kosher amazing awesome wonderful perfect lovely fantastic incredible terrible awful annoyed disappointed eu você
depois agora ainda já sempre nunca novo nova minha meu sua seu voce uma um não nao com mais muito obrigado obrigada
quero gostaria preciso e da na"""
)
_GIVEN = _words(
    """maria jose juan antonio ana carmen manuel luis francisco javier carlos daniel david laura isabel jesus marta pablo sergio
cristina alejandro miguel lucia jorge alberto pilar alvaro paula elena raquel diego adrian sara fernando raul ivan ruben
enrique ramon vicente andres joaquin santiago eduardo victor mario roberto jaime marcos ignacio hugo alfonso salvador
ricardo emilio julian guillermo gabriel agustin felix nicolas martin tomas ismael samuel gonzalo aitor alfredo oscar xavier
jordi marc josep joan montserrat nuria silvia monica patricia rocio beatriz eva sonia andrea irene natalia julia teresa
alicia sandra angela veronica susana yolanda noelia nerea miriam lorena claudia carolina ines marina sofia valentina
valeria camila daniela mariana fernanda gabriela adriana alejandra ximena jimena renata regina guadalupe leticia norma
gloria martha rosario lourdes fatima consuelo esther encarnacion concepcion josefa francisca antonia manuela juana catalina
lidia olga blanca celia emma martina olivia alma vega carla noa leo mateo lucas enzo thiago benjamin emiliano maximiliano
sebastian matias facundo agustina florencia micaela camilo esteban rodrigo cesar hector gustavo rafael armando arturo
ernesto gerardo leonardo mauricio omar orlando rene rolando wilson freddy edwin marcelo cristian christian jonathan kevin
brian bryan alan axel dylan ian erick erika karen karina karla katherine lisbeth melissa nancy nataly paola rosa rosana
ruth tatiana vanessa vivian wendy yesenia zulema milagros mercedes dolores amparo pepe paco quique nacho lola charo
maite itziar amaia ane iker unai gorka xabier
joao antonio paulo pedro lucas luiz marcos gabriel rafael felipe bruno rodrigo thiago tiago matheus mateus guilherme gustavo
leandro fabio caio davi arthur heitor miguel bernardo vinicius vitor renato sergio marcio andre flavio diogo rui nuno
duarte goncalo vasco mariana juliana fernanda patricia aline bruna camila leticia amanda beatriz larissa vanessa jessica
bianca luana tatiane sabrina debora priscila raquel rafaela helena heloisa alice laura manuela isabela isabella giovanna
yasmin lorena livia clara cecilia marcia sandra adriana simone luciana cristiane rosana tereza ines joana margarida matilde
leonor carolina madalena
james john robert michael william david richard joseph thomas charles christopher daniel matthew anthony donald steven paul
andrew joshua kenneth george edward jason jeffrey ryan jacob gary nicholas eric stephen larry justin scott brandon samuel
gregory alexander patrick raymond tyler aaron adam nathan henry zachary peter kyle noah ethan jeremy keith roger gerald
mary patricia jennifer linda elizabeth barbara susan jessica sarah karen lisa nancy betty margaret sandra ashley kimberly
emily donna michelle carol amanda melissa deborah stephanie rebecca sharon cynthia kathleen amy anna shirley angela emma
brenda pamela nicole samantha katherine christine helen debra rachel carolyn janet maria heather diane julie joyce victoria
kelly lauren joan evelyn olivia megan hannah sophia charlotte liam oliver"""
)
"""Frequent given names without accents: what tells a name in small letters from another answer."""
# An answer that begins so is no name.
_REPLIES = _words(
    """claro perfecto perfecta vale dale listo lista correcto correcta exacto exacta exactamente confirmo confirmado confirmada
confirmar cancelar cancela cancelo cancelado ninguno ninguna nadie espera espere momento disculpa disculpe disculpas
perdón perdon depende igual mismo misma mío mía mio mia genial excelente adelante cambiar cambio nunca jamás quizás
quizas tal vez verdad cierto saludos adiós adios chau chao bueno okey ajá aja obvio seguro ambos todos hoy mediodía
jueves miércoles miercoles sabado olvídalo olvidalo déjalo dejalo después despues luego humano agente operador operadora
ayuda consulta turno efectivo tarjeta familia urgente entendido entiendo anónimo anonimo acuerdo efectivamente buenísimo
bárbaro vaya uy ah oh eh sure yep yeah yup nope nah cancel stop wait none nobody never nevermind mind perfect great
exactly absolutely definitely maybe myself mine hello hey bye goodbye same whatever agent human someone anyone nothing
dental appointment event meeting reservation booking any cool awesome alright confirm confirmed nice one two help monday
tuesday wednesday thursday friday saturday sunday today tomorrow tonight reminder dinner lunch certo beleza tá ta bom
isso pode ninguém tchau olá ola amanhã hoje tudo talvez mil muchísimas muchisimas holaa sip sipi dos tres cuatro cinco
seis siete ocho diez doce ayer pésimo pesimo buenisimo cancelala cancélala cancelalo anulala anúlala anular excellent
wonderful sweet later yesterday three four five six"""
)
# Also names, also ordinary words: a lone part is replaced only where it is written with a capital.
_COMMON = _words(
    """rosa luz cruz mar sol paz blanca flor flores reyes iglesias vega campos prado santos ángel angel dolores pilar mercedes
consuelo león leon rubio moreno delgado bravo calvo cortés rico casas castillo torres rojas luna estrella clara domingo
julio abril soledad esperanza gloria victoria alma amparo remedios milagros perla violeta margarita jazmín olivo mesa hierro
ríos rios montes valle lagos fuentes guerra duro franco salvador cabello barba calle nieves cielo aurora alba fe gracia
vidal bueno marín sierra salas pardo blanco prieto gallo lobo cordero pastor herrero zapatero romero parra will may mark
grace hope rose bill art frank jack april june young king white brown black green long price cook baker rich bell park day
summer dean miles chase drew ray dawn joy faith sky iris lily daisy ruby amber pat sue bob rob don gene dale glen wood wells
rice fish"""
)
_FOLDED = (*zip("áéíóúü", "aeiouu", strict=True), *((c, "") for c in " \t\u00a0()./-"))  # faster than str.translate
_ACCENTS = {c: f"[{pair}]" for pair in ("aá", "eé", "ií", "oó", "uúü") for c in pair + pair.upper()}


def _name_words(words: list[re.Match[str]], strong: bool, shouting: bool) -> list[re.Match[str]]:
    """The first words as far as they are a name: up to four, with their particles; a weak introduction asks for capitals."""
    kept: list[re.Match[str]] = []
    held: list[re.Match[str]] = []  # particles wait for the word that they lead to
    full = lowered = 0  # words without particles; those of them in lower case
    for word in words:
        low, upper = word[0].casefold(), word[0][0].isupper()
        capital = upper and not shouting  # capitals say nothing where all is in capitals
        if kept and low in _PARTICLES and not upper:
            held.append(word)
            continue
        if low in _STOP or full == 4 or not (capital or strong):
            break
        if held and (low in _PLACES or (capital and low in _PARTICLES)):
            break
        if not capital and (len(low) < 2 or lowered == 3 or (held and held[-1][0].casefold() in ("y", "e"))):
            break
        if not (strong or full) and low.endswith(("ing", "ísimo", "ísima")):  # "I am Looking"
            break
        kept += [*held, word]
        held, full, lowered = [], full + 1, lowered + (not capital)
    return kept


def find_names(text: str) -> Iterator[Span]:
    """Names right after an introduction or the label of a form, title and article aside."""
    low = small(text)
    for m in _INTRO.finditer(low):
        strong, name = m["strong"] is not None, text[slice(*m.span("name"))]
        first = name.split()[0]
        shouting = text[slice(*m.span("intro"))].isupper() and first.isupper() and len(first) > 1
        words = _name_words(list(_NAME_WORD.finditer(name)), strong, shouting)
        if not words or (len(words) == 1 and len(words[0][0]) < 2):
            continue
        if first.islower() and (first in _REPLIES or _ONLY_ARTICLE.fullmatch(text, m.start(), m.start("name"))):
            continue  # "mi nombre es correcto", "a nombre de mi jefe"
        yield m.start("name") + words[0].start(), m.start("name") + words[-1].end()
    for m in _CALLER.finditer(low) if any(map(low.__contains__, ("aqu", "this", "habla"))) else ():
        name = text[slice(*m.span("name"))]
        parts = list(_NAME_WORD.finditer(name))
        words = _name_words(parts, strong=False, shouting=name.isupper())
        named = len(words) == len(parts) and words[0][0].casefold() not in _REPLIES  # nothing else is said before the stop
        if words and named and (m["here"] or len(words) > 1 or m["end"].isalpha()):
            yield m.start("name") + words[0].start(), m.start("name") + words[-1].end()


def asks_name(text: str) -> bool:
    """Whether the next text may be a bare name: "¿A nombre de quién?", "Your name, please"."""
    low = text.casefold()
    return any(sign in low for sign in ("nombre", "name", "nome", "llam", "chama")) and _ASK_NAME.search(text) is not None


def answered_name(text: str) -> Span | None:
    """The name in an answer that holds nothing else, or begins with it: "Ana Pérez", "sí, ana pérez, gracias", "Ana Pérez, mi
    teléfono es …"; not in "Claro" or "CANCELAR". In small letters only after a frequent given name."""
    m = _ANSWER.match(text)
    if m is None:
        return None
    parts = list(_NAME_WORD.finditer(m["name"]))
    first = parts[0][0]
    given = _bare(first) in _GIVEN
    words = _name_words(parts, strong=given and first.islower(), shouting=False)
    if not words or first.casefold() in _REPLIES:
        return None
    if len(words) == 1 and first[0].isupper() and first.isupper():  # one letter, or shouted: hardly a name
        return None
    end = m.start("name") + words[-1].end()
    sure = given or len(words) > 1
    whole = len(text) <= MAX_ANSWER and _ANSWER_END.fullmatch(text, end)
    return (m.start("name") + words[0].start(), end) if whole or (sure and _MORE.match(text, end)) else None


def _bare(word: str) -> str:
    """A word in small letters without any mark: joao for João."""
    return "".join(c for c in unicodedata.normalize("NFD", word.casefold()) if not unicodedata.combining(c))


def fold(text: str) -> str:
    """Small letters without accents and without what people put between the digits of a number: for quick looks only."""
    text = text.casefold()
    for letter, plain in _FOLDED:
        text = text.replace(letter, plain)
    return text


def name_patterns(name: str) -> list[tuple[str, str]]:
    """What stands for a found name in the conversation's other texts: the whole name, and each part of it alone. Each with what
    a text holds, folded, in which it can be."""
    words = name.split()
    whole_name = r"\s+".join(map(_letters, words))
    parts = [w for w in words if len(w) >= 3 and w.casefold() not in _PARTICLES | _STOP]
    common = [(rf"{w[0].upper()}(?i:{_letters(w[1:])})", w) for w in parts if w.casefold() in _COMMON]
    other = [(rf"(?i:{_letters(w)})", w) for w in parts if w.casefold() not in _COMMON]
    whole = [(rf"(?i:{whole_name})", words[0])] if len(words) > 1 else []
    return [(START + pattern + END, fold(word)) for pattern, word in whole + other + common]


def _letters(word: str) -> str:
    """A word's pattern that does not mind accents (ana perez, Ana Pérez)."""
    return "".join(_ACCENTS.get(c, re.escape(c)) for c in word)
