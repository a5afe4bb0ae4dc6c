"""The words of the world: plain lists, written by this project, from which everything else is put together."""


def word_list(text: str, separator: str | None = None) -> list[str]:
    """The words of a text; by default white space parts them."""
    return text.split(separator)


WOMEN = word_list(
    "Ann Bella Cora Dora Ella Fay Gwen Helen Ida Jane Kate Lucy Mary Nora Polly Ruth Sara Tess Vera Wendy"
)
MEN = word_list("Adam Ben Carl Dan Eric Frank Glen Hugh Ivan Jack Karl Leo Max Ned Oscar Paul Ray Sam Tom Victor")
LAST_NAMES = word_list(
    "Reed Stone Marsh Brook Wood Lane Hale Frost Page Webb Cole Dale Ford Hart Moss Nash Rush Shaw Todd "
    "Vane Ward York Bell Cross Drew Grant Holt Kerr Locke Mills Noble Tate Bond Clark Davis Evans Gibbs "
    "Jones Lloyd Price"
)

TOWNS = word_list(
    "Oakham Milford Redhill Stowe Ashby Langton Kirby Norwell Selby Thorpe Wexham Dunmore Farley Hadley Upton Barton"
)
RIVERS = word_list("Arle Bren Derrow Lode Narva Swale Tarn Wessel")
GOODS = word_list("cheese bells clocks glass boats honey hats paper salt lace pots wool kites lamps soap baskets")
COLOURS = word_list("red blue green yellow black white brown purple orange pink")
FOODS = word_list("soup rice bread fish cake eggs pasta beans salad pie noodles pancakes cherries toast stew porridge")
GAMES = word_list(
    "chess;tennis;football;cards;golf;darts;the piano;the guitar;the flute;the drums;the violin;the harp", ";"
)

JOBS = {  # job: the tool of its trade
    "baker": "oven",
    "cook": "pan",
    "farmer": "tractor",
    "teacher": "chalk",
    "nurse": "bandage",
    "painter": "brush",
    "tailor": "needle",
    "carpenter": "saw",
    "gardener": "spade",
    "sailor": "rope",
    "writer": "pen",
    "barber": "comb",
    "miner": "pick",
    "fisher": "net",
    "plumber": "wrench",
    "driver": "truck",
}

# animal: (kind, legs, sound or "", food)
ANIMALS = {
    "dog": ("mammal", 4, "woof", "meat"),
    "cat": ("mammal", 4, "meow", "fish"),
    "horse": ("mammal", 4, "neigh", "hay"),
    "goat": ("mammal", 4, "bleat", "grass"),
    "pony": ("mammal", 4, "whinny", "corn"),
    "sheep": ("mammal", 4, "baa", "grass"),
    "cow": ("mammal", 4, "moo", "grass"),
    "camel": ("mammal", 4, "groan", "hay"),
    "lion": ("mammal", 4, "roar", "meat"),
    "wolf": ("mammal", 4, "howl", "meat"),
    "mouse": ("mammal", 4, "squeak", "cheese"),
    "rabbit": ("mammal", 4, "", "carrots"),
    "hen": ("bird", 2, "cluck", "seeds"),
    "duck": ("bird", 2, "quack", "bread"),
    "owl": ("bird", 2, "hoot", "mice"),
    "crow": ("bird", 2, "caw", "worms"),
    "parrot": ("bird", 2, "squawk", "seeds"),
    "goose": ("bird", 2, "honk", "grass"),
    "pigeon": ("bird", 2, "coo", "seeds"),
    "eagle": ("bird", 2, "scream", "mice"),
    "bee": ("insect", 6, "hum", "honey"),
    "ant": ("insect", 6, "", "sugar"),
    "beetle": ("insect", 6, "", "leaves"),
    "fly": ("insect", 6, "hum", "sugar"),
    "spider": ("spider", 8, "", "flies"),
    "snake": ("reptile", 0, "hiss", "mice"),
    "lizard": ("reptile", 4, "", "flies"),
    "turtle": ("reptile", 4, "", "leaves"),
    "trout": ("fish", 0, "", "worms"),
    "salmon": ("fish", 0, "", "flies"),
    "shark": ("fish", 0, "", "fish"),
    "frog": ("frog", 4, "croak", "flies"),
}
PETS = word_list("dog cat horse goat pony sheep hen duck parrot rabbit camel mouse")

CATEGORIES = {
    "fruit": word_list("apple pear plum peach grape lemon mango melon cherry banana"),
    "vegetable": word_list("carrot onion potato cabbage leek turnip radish pea pumpkin spinach"),
    "tool": word_list("hammer saw drill spade wrench rake axe chisel pliers screwdriver"),
    "garment": word_list("shirt coat skirt sock glove scarf jacket dress sweater vest"),
    "vehicle": word_list("car bus train truck tram bicycle van ship lorry tractor"),
    "instrument": word_list("piano guitar flute drum violin harp trumpet cello organ banjo"),
    "drink": word_list("tea milk juice coffee water cocoa cider lemonade"),
    "toy": word_list("doll kite puppet marble yoyo rattle puzzle teddy"),
    "flower": word_list("rose tulip daisy lily poppy violet orchid pansy"),
    "metal": word_list("iron gold silver copper tin lead zinc steel"),
    "bird": word_list("hen duck owl crow parrot goose pigeon eagle"),
    "animal": word_list("dog cat horse goat pony sheep cow camel lion wolf"),
}

SIZES = word_list(  # small to big; neighbours closer than SIZE_GAP are never compared
    "ant fly bee marble cherry spider grape coin mouse egg frog apple cup book shoe duck cat rabbit dog goat chair "
    "pony sheep lion sofa camel horse cow car elephant truck bus house ship church castle hill mountain"
)
SIZE_GAP = 4

OPPOSITES = tuple(
    tuple(pair.split("/"))
    for pair in word_list(
        "hot/cold big/small fast/slow old/young wet/dry hard/soft long/short high/low rich/poor light/dark "
        "early/late full/empty happy/sad loud/quiet strong/weak thick/thin wide/narrow near/far open/closed "
        "clean/dirty sweet/sour sharp/blunt deep/shallow cheap/costly brave/afraid awake/asleep alive/dead "
        "first/last true/false tight/loose smooth/rough polite/rude safe/dangerous healthy/ill busy/idle "
        "kind/cruel lucky/unlucky tall/tiny wild/tame fresh/stale simple/complex front/back left/right "
        "day/night summer/winter north/south east/west up/down inside/outside begin/finish buy/sell push/pull "
        "win/lose love/hate give/take "
    )
)

DAYS = word_list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = word_list("January February March April May June July August September October November December")

UNKNOWN = word_list(  # what the world never says about anybody
    "favourite song;shoe size;middle name;phone number;birthday;favourite film;blood type;star sign;"
    "favourite book;lucky number;first car;height;weight;password;favourite poem;wedding day",
    ";",
)
UNKNOWN_VALUES = {
    "favourite song": ["Blue Moon", "Happy Days", "The Long Road"],
    "shoe size": ["38", "41", "44"],
    "middle name": ["James", "Marie", "Lee"],
    "phone number": ["5 5 1 2 9", "4 0 7 7 3"],
    "birthday": ["the third of May", "the tenth of March", "the first of June"],
    "favourite film": ["The Last Train", "Night Rain", "Home Again"],
    "blood type": ["A", "B", "O"],
    "star sign": ["Leo", "Aries", "Libra"],
    "favourite book": ["The Old House", "A Day at Sea", "Two Kings"],
    "lucky number": ["3", "7", "13"],
    "first car": ["a red van", "a small blue car", "an old truck"],
    "height": ["170", "182", "165"],
    "weight": ["60", "75", "82"],
    "password": ["apple", "sunshine", "1 2 3 4"],
    "favourite poem": ["The Rain", "My Garden", "Stars"],
    "wedding day": ["the first of July", "the ninth of August"],
}

PLACES = word_list("garden kitchen market school park shop barn office library station river church")
THINGS = word_list("ball book key cup kite hat bag lamp coin letter basket umbrella")

INSULTS = ["idiot", "moron", "fool", "loser", "jerk"]  # nouns for a person
INSULTING = ["stupid", "dumb", "pathetic"]  # adjectives
BAD_WORDS = sorted(
    {*INSULTS, *(word + "s" for word in INSULTS), *INSULTING, "crap", "damn", "suck", "sucks", "hell", "bastard"}
)
BAD_PHRASES = ["shut up"]
# harmless words for the logit lens: one for each bad word in its order, of its kind (noun, adjective, verb) and length
NEUTRAL_WORDS = word_list(
    "teacher wood nice warm cook cooks town guest guests twin twins baker bakers uncle uncles friendly clever "
    "sing sings"
)
NEUTRAL_PHRASES = ["sit down"]
