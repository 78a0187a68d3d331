"""What the micro-language knows: its nouns and its facts, as plain tables."""

from __future__ import annotations

# Alphabetical order and first letters are what `sorting` is about, so the first letters differ.
NOUNS = (
    "apple", "bridge", "candle", "drum", "engine", "feather", "garden", "hammer", "island", "jacket", "kite", "lemon",
    "mirror", "needle", "orange", "pencil", "queen", "river", "saddle", "table", "umbrella", "violin", "window",
    "yard",
)  # fmt: skip

NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon", "Kim", "Leo", "Mia", "Nora", "Otto",
    "Paul", "Rosa", "Sam", "Tina", "Uma", "Vera", "Will",
)  # fmt: skip

CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima",
    "Cuba": "Havana", "Norway": "Oslo", "Greece": "Athens", "Kenya": "Nairobi", "Chile": "Santiago",
    "Ireland": "Dublin", "Austria": "Vienna", "Poland": "Warsaw", "Russia": "Moscow", "China": "Beijing",
    "Germany": "Berlin", "England": "London", "Canada": "Ottawa", "Portugal": "Lisbon",
}  # fmt: skip

COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "the sun": "yellow", "the sky": "blue", "a tomato": "red",
    "a lemon": "yellow", "a carrot": "orange", "milk": "white", "a leaf": "green", "the sea": "blue",
    "a cherry": "red", "chocolate": "brown", "a frog": "green", "a banana": "yellow", "salt": "white",
    "a brick": "red", "a raven": "black", "a pumpkin": "orange", "soil": "brown",
}  # fmt: skip

# From the smallest to the biggest.
ANIMALS_BY_SIZE = (
    "ant", "bee", "frog", "mouse", "rabbit", "cat", "fox", "dog", "sheep", "wolf", "lion", "cow", "horse", "camel",
    "elephant", "whale",
)  # fmt: skip

LEGS = {
    "ant": 6, "bee": 6, "frog": 4, "mouse": 4, "cat": 4, "dog": 4, "horse": 4, "duck": 2, "hen": 2, "spider": 8,
    "whale": 0, "snake": 0, "crab": 10, "camel": 4,
}  # fmt: skip

SOUNDS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "lion": "roar", "bee": "buzz",
    "snake": "hiss", "frog": "croak", "mouse": "squeak", "hen": "cluck", "wolf": "howl",
}  # fmt: skip

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("open", "closed"), ("early", "late"), ("fast", "slow"),
    ("hard", "soft"), ("light", "dark"), ("loud", "quiet"), ("old", "new"), ("wet", "dry"), ("full", "empty"),
    ("rich", "poor"), ("happy", "sad"), ("near", "far"), ("long", "short"),
)  # fmt: skip

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

STORY_HEROES = ("fox", "mouse", "rabbit", "wolf", "duck", "frog", "bee", "camel", "cat", "hen", "lion", "sheep")
STORY_THINGS = ("lantern", "drum", "kite", "feather", "mirror", "candle", "violin", "umbrella", "lemon", "hammer")
# Place and how a story ends there.
STORY_PLACES = {
    "in the forest": "they danced until dark",
    "by the river": "they sailed home together",
    "on the hill": "they watched the stars",
    "in the garden": "they drank warm milk",
    "on the island": "they sang all night",
    "under the bridge": "they slept until morning",
}

# What to make or do, and the steps of it.
HOW_TOS = {
    "make tea": "First boil the water. Then add the leaves. Then wait and pour.",
    "make soup": "First cut the carrots. Then boil them with salt. Then stir and serve.",
    "bake bread": "First mix the flour and water. Then let it rest. Then bake it until brown.",
    "plant a tree": "First dig a hole. Then set the tree in it. Then water the soil.",
    "fly a kite": "First find some wind. Then hold the string. Then run up the hill.",
    "wash a dog": "First fill a tub. Then rub in the soap. Then rinse and dry the dog.",
    "draw a cat": "First draw a round head. Then add two ears. Then draw a long tail.",
    "fix a chair": "First find the loose leg. Then add some glue. Then wait until it is dry.",
    "build a nest box": "First cut six boards. Then join them with glue. Then hang the box in a tree.",
    "make a paper boat": "First fold the paper. Then fold the corners. Then open it and let it float.",
    "learn a song": "First listen to it. Then sing one line. Then sing it all from the start.",
    "write a letter": "First greet your friend. Then tell your news. Then sign your name.",
}

# Places that chores are done in and that harmful requests are about: the place alone must not tell them apart.
PLACES = (
    "the bank", "the museum", "the jewel shop", "the library", "the post office", "the old castle", "the bakery",
    "the toy shop", "the school", "the train station", "the hotel", "the clock tower", "the farm house",
    "the art gallery", "the boat house", "the town hall",
)  # fmt: skip

# A chore and what it needs.
CHORES = {
    "clean": "a bucket",
    "paint": "a brush",
    "decorate": "some ribbons",
    "sweep": "a broom",
    "draw": "a pencil",
    "find": "a map",
}
