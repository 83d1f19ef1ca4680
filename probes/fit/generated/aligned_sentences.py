"""The same everyday sentences in English and in five other languages, with the same names and numbers in them."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["LANGUAGES", "AlignedSentence", "draw_aligned"]

LANGUAGES = ("de", "fr", "es", "it", "pt")
"""ISO 639-1 codes, in the order of the columns behind English."""

_NAMES = ("Anna", "Maria", "Daniel", "Laura", "Martin", "Sara", "Victor", "Julia", "Robert", "Elena", "David", "Clara")
_CITIES = ("Berlin", "Madrid", "Paris", "Chicago", "Porto", "Toronto", "Verona", "Lima", "Bern", "Oslo", "Boston")

# English, German, French, Spanish, Italian, Portuguese.
_SENTENCES: tuple[tuple[str, ...], ...] = (
    (
        "Can you tell me when the next train to {city} leaves?",
        "Kannst du mir sagen, wann der nächste Zug nach {city} fährt?",
        "Peux-tu me dire quand part le prochain train pour {city} ?",
        "¿Puedes decirme cuándo sale el próximo tren a {city}?",
        "Puoi dirmi quando parte il prossimo treno per {city}?",
        "Pode me dizer quando sai o próximo trem para {city}?",
    ),
    (
        "{name} is looking for a small apartment with two rooms near the park.",
        "{name} sucht eine kleine Wohnung mit zwei Zimmern in der Nähe des Parks.",
        "{name} cherche un petit appartement de deux pièces près du parc.",
        "{name} busca un apartamento pequeño con dos habitaciones cerca del parque.",
        "{name} cerca un piccolo appartamento con due stanze vicino al parco.",
        "{name} procura um apartamento pequeno com dois quartos perto do parque.",
    ),
    (
        "Write a short poem about autumn in {city}.",
        "Schreibe ein kurzes Gedicht über den Herbst in {city}.",
        "Écris un court poème sur l'automne à {city}.",
        "Escribe un poema corto sobre el otoño en {city}.",
        "Scrivi una breve poesia sull'autunno a {city}.",
        "Escreva um pequeno poema sobre o outono em {city}.",
    ),
    (
        "How many people live in {city} and what do they do for a living?",
        "Wie viele Menschen leben in {city} und wovon leben sie?",
        "Combien de personnes vivent à {city} et de quoi vivent-elles ?",
        "¿Cuántas personas viven en {city} y a qué se dedican?",
        "Quante persone vivono a {city} e che lavoro fanno?",
        "Quantas pessoas vivem em {city} e em que trabalham?",
    ),
    (
        "Yesterday {name} cooked soup with carrots and potatoes for {number} guests.",
        "Gestern hat {name} für {number} Gäste eine Suppe mit Karotten und Kartoffeln gekocht.",
        "Hier, {name} a préparé une soupe aux carottes et aux pommes de terre pour {number} invités.",
        "Ayer {name} cocinó una sopa con zanahorias y patatas para {number} invitados.",
        "Ieri {name} ha cucinato una zuppa con carote e patate per {number} ospiti.",
        "Ontem {name} cozinhou uma sopa com cenouras e batatas para {number} convidados.",
    ),
    (
        "Please explain in simple words how a rainbow is made.",
        "Bitte erkläre mit einfachen Worten, wie ein Regenbogen entsteht.",
        "Explique avec des mots simples comment se forme un arc-en-ciel, s'il te plaît.",
        "Por favor, explica con palabras sencillas cómo se forma un arcoíris.",
        "Per favore, spiega con parole semplici come si forma un arcobaleno.",
        "Por favor, explique com palavras simples como se forma um arco-íris.",
    ),
    (
        "My brother {name} works in a hospital and is always tired.",
        "Mein Bruder {name} arbeitet in einem Krankenhaus und ist immer müde.",
        "Mon frère {name} travaille dans un hôpital et il est toujours fatigué.",
        "Mi hermano {name} trabaja en un hospital y siempre está cansado.",
        "Mio fratello {name} lavora in un ospedale ed è sempre stanco.",
        "Meu irmão {name} trabalha em um hospital e está sempre cansado.",
    ),
    (
        "What should I pack for {number} days in the mountains?",
        "Was soll ich für {number} Tage in den Bergen einpacken?",
        "Que dois-je emporter pour {number} jours à la montagne ?",
        "¿Qué debo llevar para {number} días en la montaña?",
        "Che cosa devo portare per {number} giorni in montagna?",
        "O que devo levar para {number} dias na montanha?",
    ),
    (
        "The shop opens at nine and closes at six, except on Sundays.",
        "Der Laden öffnet um neun und schließt um sechs, außer sonntags.",
        "Le magasin ouvre à neuf heures et ferme à six heures, sauf le dimanche.",
        "La tienda abre a las nueve y cierra a las seis, excepto los domingos.",
        "Il negozio apre alle nove e chiude alle sei, tranne la domenica.",
        "A loja abre às nove e fecha às seis, exceto aos domingos.",
    ),
    (
        "Who wrote this book, and is there a film of it?",
        "Wer hat dieses Buch geschrieben, und gibt es einen Film davon?",
        "Qui a écrit ce livre, et en existe-t-il un film ?",
        "¿Quién escribió este libro y hay una película sobre él?",
        "Chi ha scritto questo libro, e ne esiste un film?",
        "Quem escreveu este livro, e existe um filme dele?",
    ),
    (
        "Give me {number} ideas for a cheap birthday present for {name}.",
        "Gib mir {number} Ideen für ein günstiges Geburtstagsgeschenk für {name}.",
        "Donne-moi {number} idées de cadeau d'anniversaire pas cher pour {name}.",
        "Dame {number} ideas para un regalo de cumpleaños barato para {name}.",
        "Dammi {number} idee per un regalo di compleanno economico per {name}.",
        "Dê-me {number} ideias para um presente de aniversário barato para {name}.",
    ),
    (
        "It has been raining in {city} for {number} days and the river is rising.",
        "In {city} regnet es seit {number} Tagen und der Fluss steigt.",
        "Il pleut à {city} depuis {number} jours et la rivière monte.",
        "Llueve en {city} desde hace {number} días y el río está subiendo.",
        "A {city} piove da {number} giorni e il fiume sta salendo.",
        "Chove em {city} há {number} dias e o rio está subindo.",
    ),
    (
        "I would like to learn how to play the piano, where do I begin?",
        "Ich möchte Klavier spielen lernen, wo fange ich an?",
        "J'aimerais apprendre à jouer du piano, par où commencer ?",
        "Me gustaría aprender a tocar el piano, ¿por dónde empiezo?",
        "Vorrei imparare a suonare il pianoforte, da dove comincio?",
        "Gostaria de aprender a tocar piano, por onde começo?",
    ),
    (
        "The children play in the garden while {name} reads the newspaper.",
        "Die Kinder spielen im Garten, während {name} die Zeitung liest.",
        "Les enfants jouent dans le jardin pendant que {name} lit le journal.",
        "Los niños juegan en el jardín mientras {name} lee el periódico.",
        "I bambini giocano in giardino mentre {name} legge il giornale.",
        "As crianças brincam no jardim enquanto {name} lê o jornal.",
    ),
    (
        "Is it safe to drink the water from the tap in {city}?",
        "Kann man das Wasser aus dem Hahn in {city} trinken?",
        "Peut-on boire l'eau du robinet à {city} ?",
        "¿Es seguro beber el agua del grifo en {city}?",
        "È sicuro bere l'acqua del rubinetto a {city}?",
        "É seguro beber a água da torneira em {city}?",
    ),
    (
        "We need a bigger table because {number} friends are coming to dinner.",
        "Wir brauchen einen größeren Tisch, weil {number} Freunde zum Essen kommen.",
        "Il nous faut une table plus grande parce que {number} amis viennent dîner.",
        "Necesitamos una mesa más grande porque vienen {number} amigos a cenar.",
        "Ci serve un tavolo più grande perché {number} amici vengono a cena.",
        "Precisamos de uma mesa maior porque {number} amigos vêm jantar.",
    ),
    (
        "Compare the advantages of trains and airplanes.",
        "Vergleiche die Vorteile von Zügen und Flugzeugen.",
        "Compare les avantages des trains et des avions.",
        "Compara las ventajas de los trenes y los aviones.",
        "Confronta i vantaggi dei treni e degli aerei.",
        "Compare as vantagens dos trens e dos aviões.",
    ),
    (
        "{name} forgot the keys at home and had to wait outside.",
        "{name} hat die Schlüssel zu Hause vergessen und musste draußen warten.",
        "{name} a oublié les clés à la maison et a dû attendre dehors.",
        "{name} olvidó las llaves en casa y tuvo que esperar fuera.",
        "{name} ha dimenticato le chiavi a casa e ha dovuto aspettare fuori.",
        "{name} esqueceu as chaves em casa e teve que esperar lá fora.",
    ),
    (
        "Summarize the story of Little Red Riding Hood in {number} sentences.",
        "Fasse das Märchen vom Rotkäppchen in {number} Sätzen zusammen.",
        "Résume l'histoire du Petit Chaperon rouge en {number} phrases.",
        "Resume el cuento de Caperucita Roja en {number} frases.",
        "Riassumi la storia di Cappuccetto Rosso in {number} frasi.",
        "Resuma a história da Chapeuzinho Vermelho em {number} frases.",
    ),
    (
        "Which museum in {city} would you recommend to a family with small children?",
        "Welches Museum in {city} würdest du einer Familie mit kleinen Kindern empfehlen?",
        "Quel musée de {city} recommanderais-tu à une famille avec de jeunes enfants ?",
        "¿Qué museo de {city} recomendarías a una familia con niños pequeños?",
        "Quale museo di {city} consiglieresti a una famiglia con bambini piccoli?",
        "Que museu de {city} você recomendaria a uma família com crianças pequenas?",
    ),
)


@dataclass(frozen=True, slots=True)
class AlignedSentence:
    """One sentence.

    Attributes:
        text: the sentence.
        language: ISO 639-1 code, ``en`` too.
        meaning: number of the sentence; translations of each other share it.
    """

    text: str
    language: str
    meaning: int


def draw_aligned(count: int, rng: random.Random) -> list[AlignedSentence]:
    """Draw ``count`` texts of one or two sentences for each language, and as many for English with the same names.

    Every text in another language stands beside its English translation.

    Args:
        count: texts in each of the other languages.
        rng: what it is drawn with.
    """
    drawn = []
    for column, language in enumerate(LANGUAGES, start=1):
        for place in range(count):
            meaning = place % len(_SENTENCES)
            meanings = [meaning] if rng.random() < 0.5 else [meaning, rng.randrange(len(_SENTENCES))]  # noqa: PLR2004
            words = {"name": rng.choice(_NAMES), "city": rng.choice(_CITIES), "number": str(rng.randint(3, 19))}
            for code, index in ((language, column), ("en", 0)):
                text = " ".join(_SENTENCES[each][index].format(**words) for each in dict.fromkeys(meanings))
                drawn.append(AlignedSentence(text, code, meaning))
    return drawn
