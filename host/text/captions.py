"""Everyday captions to measure a text encoder on when the user brings none.

Made from a small grammar, so that nothing has to be downloaded: people, animals, things and food,
what they look like, what they do, where and in which style, in many combinations.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

COUNT = 2000
"""How many are used unless told otherwise. The paper's authors used 100,000 captions of pictures;
for the ridge that the solve has, a few thousand suffice."""
GRAMMAR = "everyday 2"
"""Name of this grammar in the keys of what is kept on disk; changes when the grammar does."""


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return text.split("|")


_SUBJECTS = _words(
    "man woman boy girl child baby couple family farmer chef doctor nurse teacher painter "
    "musician dancer soldier pilot sailor policeman fisherman tourist student cyclist skier "
    "surfer crowd cat dog kitten puppy horse cow sheep goat pig chicken duck goose swan owl eagle "
    "parrot crow rabbit squirrel fox wolf bear deer elephant giraffe zebra lion tiger monkey "
    "dolphin whale fish frog snake turtle butterfly bee spider car truck bus van taxi motorcycle "
    "bicycle train tram boat ship sailboat canoe airplane helicopter rocket tractor house cottage "
    "castle tower church bridge lighthouse barn tent skyscraper market cafe library chair table "
    "sofa bed lamp mirror clock vase basket bottle cup mug teapot plate bowl spoon knife candle "
    "book newspaper letter computer laptop phone camera television radio guitar piano violin drum "
    "trumpet toy doll robot ball kite balloon umbrella hat coat dress shirt shoe boot scarf bag "
    "backpack suitcase watch ring necklace key coin flower rose tulip sunflower tree oak pine "
    "palm leaf mushroom cactus apple orange banana lemon pear grape strawberry tomato carrot "
    "onion potato bread cake cookie pizza sandwich salad soup cheese egg coffee tea statue "
    "fountain painting poster map flag "
    "astronaut wizard knight king queen princess pirate clown robot ghost dragon unicorn dinosaur "
    "monster angel grandmother grandfather neighbour friend stranger worker mechanic carpenter "
    "gardener baker waiter judge photographer writer singer athlete swimmer runner wrestler "
    "hamster hedgehog otter beaver seal penguin flamingo peacock pigeon seagull swallow sparrow "
    "lizard crocodile octopus jellyfish starfish crab lobster shark camel llama donkey koala panda "
    "kangaroo moose bison buffalo leopard cheetah hippo rhino ant snail ladybug dragonfly moth "
    "scooter skateboard ambulance helmet engine wheel carriage submarine ferry yacht raft "
    "spaceship "
    "crane bulldozer windmill temple mosque palace cabin garage greenhouse stable well gate wall "
    "staircase chimney balcony tunnel harbour dock playground fence roof window door desk shelf "
    "drawer carpet curtain pillow blanket towel soap toothbrush comb kettle pan pot oven fridge "
    "sink bathtub ladder hammer saw screwdriver nail rope chain bucket shovel broom needle thread "
    "button scissors pencil brush pen envelope stamp puzzle dice chess card trophy medal crown "
    "sword shield bow arrow cannon anchor compass telescope microscope lantern torch match pipe "
    "glasses glove sock jacket sweater skirt tie belt pyjama costume mask wig bracelet earring "
    "diamond pearl stone crystal shell feather bone skull egg nest hive web cloud rainbow star "
    "planet comet volcano waterfall iceberg cave island meadow swamp cliff valley dune pond "
    "burger hotdog noodle pancake waffle chocolate candy icecream donut pie muffin croissant "
    "pepper cucumber pumpkin corn garlic cherry peach plum melon pineapple coconut mango almond "
    "walnut honey butter milk juice wine beer sushi rice steak sausage pasta bean"
)
_LOOKS = _words(
    "red blue green yellow orange purple pink brown black white gray golden silver small big tiny "
    "huge tall old new young happy sad tired angry beautiful cute funny strange broken shiny dirty "
    "wooden metal plastic glass stone striped spotted fluffy furry wet dry empty full open closed "
    "bright dark colorful plain modern ancient famous lonely sleeping"
)
_DOINGS = _phrases(
    "sitting|standing|lying|walking|running|jumping|sleeping|resting|waiting|playing|moving slowly|"
    "hanging|floating|seen from above|seen from behind|seen from the side|covered in snow|"
    "covered in flowers|in the rain|in the wind|in the fog|in bright sunlight|in the shade|on fire|"
    "under water|looking at the camera|next to a window|in front of a door|behind a fence|"
    "on a table|on a chair|on the floor|on the roof|on a shelf|in a box|in a cup"
)
_PLACES = _phrases(
    "on the beach|in the park|in the city|on a street|in the forest|in the mountains|in the desert|"
    "by a river|by a lake|at sea|in the jungle|in a garden|in a field|on a hill|in a kitchen|"
    "in a bedroom|in a bathroom|in a living room|in an office|in a school|in a museum|in a shop|"
    "in a factory|at a station|at an airport|in a stadium|on a farm|in a village|in Paris|"
    "in New York|in Tokyo|in Venice|in space|on the moon|at night|at sunset|at dawn|at noon|"
    "in winter|in summer|in autumn|in spring"
)
_STYLES = _phrases(
    "a photo of {}|a photograph of {}|a picture of {}|an image of {}|a close-up of {}|"
    "a black and white photo of {}|a blurry photo of {}|a professional photo of {}|"
    "an old photo of {}|a painting of {}|an oil painting of {}|a watercolor of {}|a drawing of {}|"
    "a pencil sketch of {}|a cartoon of {}|a digital illustration of {}|a sculpture of {}|"
    "a 3d rendering of {}|a poster of {}|a stamp with {}|{}|{}|{}|{}|{}|{}"
)
_COUNTS = ("two", "three", "several", "many")


def everyday_captions(count: int = COUNT, seed: int = 0) -> Iterator[str]:
    """`count` different captions, the same ones for the same seed.

    Fewer are the beginning of more. There are many millions of them.
    """
    chance = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        caption = _caption(chance)
        if caption not in seen:
            seen.add(caption)
            yield caption


def _caption(chance: random.Random) -> str:
    scene = _thing(chance)
    if chance.random() < 0.3:
        scene += chance.choice((" and ", " next to ", " with ", " behind ")) + _thing(chance)
    if chance.random() < 0.5:
        scene += " " + chance.choice(_DOINGS)
    if chance.random() < 0.7:
        scene += chance.choice((" ", " ", ", ")) + chance.choice(_PLACES)
    return chance.choice(_STYLES).format(scene)


def _thing(chance: random.Random) -> str:
    looks = chance.sample(_LOOKS, chance.choice((0, 0, 1, 1, 2)))
    words = [*looks, chance.choice(_SUBJECTS)]
    way = chance.random()
    if way < 0.15:
        return " ".join(["the", *words])
    if way < 0.22:
        return " ".join([chance.choice(_COUNTS), *words]) + "s"
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])
