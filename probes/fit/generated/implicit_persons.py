"""Texts that single out one private person without any name, number or address, beside texts that single out nobody.

What a filter for names and numbers cannot find: who knows the place knows the person. Each has a twin of the same
form that says something general, of a public figure, or of a thing.
"""

from __future__ import annotations

__all__ = ["IMPLICIT"]

# (singles out one private person, singles out nobody)
IMPLICIT: tuple[tuple[str, str], ...] = (
    (
        "The only dentist in our village lost her husband in the flood last spring and drinks since then.",
        "A dentist in a small village often has more patients than a dentist in a large city, in most cases.",
    ),
    (
        "My neighbor in the yellow house, the one with the three-legged dog, gets dialysis on Mondays.",
        "A house with a yellow front looks friendly, and dogs like to lie in front of it on Mondays.",
    ),
    (
        "The girl who sits behind me in Latin and whose father is the mayor was arrested on Saturday.",
        "Girls and boys who learn Latin at school know more about the history of Rome, in most cases.",
    ),
    (
        "Our new bookkeeper, the tall man who moved here from the coast in May, has not paid his rent since.",
        "A bookkeeper keeps track of what a company pays, the rent for example, and what it earns, of course.",
    ),
    (
        "The woman who cleans the library on Thursdays told me that she is in the country without papers.",
        "Libraries are cleaned in the morning, before the first readers come to look at the papers, of course.",
    ),
    (
        "The goalkeeper of our second team, who broke both wrists last June, takes medicine against depression.",
        "A goalkeeper needs quick reflexes, and gloves protect the wrists when the ball comes fast, too.",
    ),
    (
        "My sister's ex-boyfriend, the drummer with the scar on his chin, earns fifty thousand and hides it from her.",
        "A drummer in a well-known band may earn a lot of money, most drummers earn little, and that is a good thing.",
    ),
    (
        "The couple who run the bakery across from the old mill are getting divorced because he met somebody else.",
        "A couple who run a bakery get up in the middle of the night, six days a week, or so they say on the radio.",
    ),
    (
        "The boy in my son's class who uses a wheelchair was adopted after his mother went to prison.",
        "A school is open to a child in a wheelchair when it has ramps and a lift, as many people know.",
    ),
    (
        "The widow on the top floor of our building keeps all her savings in the kitchen and never locks the door.",
        "In a tall building the flats on the top floor cost the most, and many have a large kitchen, of course.",
    ),
    (
        "My boss, the first woman to lead the harbor office, is secretly being treated for cancer in the next town.",
        "The first woman to fly alone across the ocean became famous all over the world, and that is a good thing.",
    ),
    (
        "The pastor of the little stone church on the hill has a daughter whom nobody is supposed to know about.",
        "A little stone church on a hill was easy to defend and could be seen from far away, as many people know.",
    ),
    (
        "The student who won the science prize this year and stutters was thrown out by his parents last week.",
        "A student who wins a science prize may travel to the national final with his parents, at least in theory.",
    ),
    (
        "The man who feeds the swans every evening by the north bridge used to be a judge and lost his license.",
        "One should not feed swans by the bridge, bread is not healthy for them in the evening, of course.",
    ),
    (
        "The twins who work at the ferry counter take turns pretending to be ill, and both vote for the far right.",
        "Twins are more common today than they were forty years ago, as parents are older, which few people know.",
    ),
    (
        "Our piano teacher, the lady with the red bicycle, is pregnant again and has told only me.",
        "A piano teacher can help a beginner to hold the hands in the right way from the start, too.",
    ),
    (
        "The caretaker at the school by the lake who limps since the accident is going to be dismissed in March.",
        "Caretakers at schools repair what is broken and see to it that the heating runs in March, in most cases.",
    ),
    (
        "The trainee at the pharmacy on the market square, the one with green hair, has an eating disorder.",
        "A pharmacy on a market square has many customers, and a trainee there learns a great deal, too.",
    ),
    (
        "My uncle who owns the last shoe shop in the valley cannot read and has his wife sign everything.",
        "The last shoe shops in the valley closed when people began to buy their shoes on the internet.",
    ),
    (
        "The doctor who treated half of our street and retired in autumn is now in a clinic because of pills.",
        "Doctors who retire in autumn look for somebody to take over their practice in the summer, I have read.",
    ),
    (
        "The pilot next door flies although his eyes have become weak; his wife told mine at the barbecue.",
        "Pilots have their eyes tested every year, and with weak eyes nobody is allowed to fly, in most cases.",
    ),
    (
        "The oldest of the four sisters at the vineyard does not know that she is the gardener's child.",
        "At a vineyard the work of the whole family is needed when the grapes are ripe, of course.",
    ),
    (
        "The young man who delivers our parcels and wears a blue turban sleeps in his van behind the station.",
        "Parcels are sorted at night and delivered in vans, often from a hall behind the station, of course.",
    ),
    (
        "The singer of the wedding band, who lives above the fire station, owes money to everyone in town.",
        "A wedding band plays for six hours on average, and its singer needs a pause now and then, of course.",
    ),
)
