"""Restaurants: tenants with menus and prices of their own, and the words of the restaurant assistant."""

from __future__ import annotations

from .phrases import load_words
from .skeletons import Domain
from .tenant import Tenant, money

TENANTS = (
    Tenant(
        "resto_la_parra",
        "La Parra",
        "restaurant",
        "AR",
        True,
        "la calle Thames 1480, Palermo",
        "la plaza Serrano",
        12 * 60,
        22 * 60 + 30,
        frozenset({0}),
        "de martes a domingo de 12:00 a 23:30",
        "los lunes",
        1500.0,
        ("Marcela, la encargada", "el encargado"),
        "+54 11 4833 0021",
        "reservas@laparra.example",
    ),
    Tenant(
        "pizzeria_nonna",
        "Pizzería Nonna",
        "restaurant",
        "ES",
        False,
        "la calle Colón 31, Valencia",
        "la estación del Norte",
        13 * 60,
        22 * 60 + 30,
        frozenset({1}),
        "de miércoles a lunes de 13:00 a 23:30",
        "los martes",
        1.0,
        ("Paolo, el encargado", "la encargada"),
        "+34 960 112 780",
        "ciao@nonna.example",
    ),
    Tenant(
        "cafe_tunari",
        "Café Tunari",
        "restaurant",
        "BO",
        True,
        "la avenida América 233, Cochabamba",
        "la plaza Quintanilla",
        9 * 60,
        21 * 60,
        frozenset({6}),
        "de lunes a sábado de 9:00 a 22:00",
        "los domingos",
        4.5,
        ("la encargada", "Rolando, el encargado"),
        "+591 4 448 2210",
        "hola@cafetunari.example",
    ),
)

# dish with article, how people say it, what is in it, euros, whether it is vegetarian
DISHES: dict[str, tuple[tuple[str, str, str, float, bool], ...]] = {
    "resto_la_parra": (
        ("el bife de chorizo", "bife de chorizo", "papas fritas", 15, False),
        ("las empanadas de carne", "empanadas", "carne cortada a cuchillo", 3, False),
        ("la provoleta", "provoleta", "orégano y tomate", 7, True),
        ("el asado de tira", "asado", "ensalada mixta", 16, False),
        ("los sorrentinos de calabaza", "sorrentinos", "salsa de crema", 11, True),
        ("la milanesa napolitana", "milanesa napolitana", "jamón, queso y puré", 13, False),
        ("el flan con dulce de leche", "flan", "dulce de leche y crema", 5, False),
        ("el matambre a la pizza", "matambre", "queso y tomate", 14, False),
    ),
    "pizzeria_nonna": (
        ("la pizza margarita", "pizza margarita", "tomate, mozzarella y albahaca", 9.5, True),
        ("la pizza cuatro quesos", "pizza cuatro quesos", "cuatro quesos italianos", 12.5, True),
        ("la pizza diávola", "pizza diávola", "salami picante", 12, False),
        ("la lasaña", "lasaña", "carne y bechamel", 11.5, False),
        ("los ñoquis al pesto", "ñoquis", "pesto de albahaca y nueces", 11, True),
        ("los espaguetis carbonara", "carbonara", "guanciale y huevo", 11, False),
        ("el tiramisú", "tiramisú", "café y mascarpone", 5.5, False),
        ("la burrata con tomate", "burrata", "tomate y aceite de oliva", 9, True),
    ),
    "cafe_tunari": (
        ("el silpancho", "silpancho", "arroz, papa y huevo", 7, False),
        ("el pique macho", "pique macho", "carne, chorizo y papas", 14, False),
        ("la sopa de maní", "sopa de maní", "papas y perejil", 4, True),
        ("las salteñas", "salteñas", "pollo o carne", 2, False),
        ("el chicharrón", "chicharrón", "mote y llajua", 11, False),
        ("la ensalada de quinua", "ensalada de quinua", "quinua, palta y tomate", 6, True),
        ("el pastel de choclo", "pastel de choclo", "choclo y queso", 5, True),
        ("la torta de chocolate", "torta de chocolate", "chocolate y frutillas", 4, False),
    ),
}

TABLES = load_words("restaurant")
WORDS: dict[str, list[str]] = TABLES["words"]
ANSWERS: dict[str, list[str]] = TABLES["answers"]


def domain(tenant: Tenant) -> Domain:
    """The restaurant domain with this tenant's hours."""
    return Domain(WORDS, ("party", "day", "hour", "name"), tenant.opens, tenant.closes, tenant.closed, tenant.country, ANSWERS)


def dish_slots(first: int, second: int, veg: tuple[int, int], tenant: Tenant) -> dict[str, str]:
    """The slots of two dishes of one restaurant, and of two vegetarian ones."""
    dishes = DISHES[tenant.tenant_id]
    green = [dish[0] for dish in dishes if dish[4]]
    name, noun, inside, euros, _ = dishes[first]
    return {
        "dish": name,
        "dish_n": noun,
        "inside": inside,
        "pl": "n" if name.startswith(("los ", "las ")) else "",
        "price": money(euros * tenant.rate, tenant.country),
        "dish_2": dishes[second][0],
        "veg_1": green[veg[0] % len(green)],
        "veg_2": green[veg[1] % len(green)],
        "set_price": money(13 * tenant.rate, tenant.country),
        "person_price": money(22 * tenant.rate, tenant.country),
    }
