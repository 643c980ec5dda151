"""The words of the world. Every list is frozen: the tokenizer and the pretrained models depend on it."""

from __future__ import annotations


def _w(text: str) -> tuple[str, ...]:
    words = tuple(text.split())
    assert len(set(words)) == len(words), sorted(w for w in set(words) if words.count(w) > 1)
    return words


# 128 first names, each one token with its leading space: known people, needles, patching.
FIRST_NAMES = _w("""
Adam Agnes Albert Alice Amy Anna Arthur Barbara Ben Bertha Bess Bob Bruce Carl Carol Cecil Charles Clara
Claire Daisy Daniel David Dora Doris Edgar Edith Edward Ella Ellen Emily Emma Eric Ernest Esther Ethel Eva
Felix Flora Florence Frank Fred George Gertrude Grace Grant Greta Guy Hannah Harold Harriet Harry Helen
Henry Herbert Hilda Howard Hugh Ida Irene Isaac Ivan Jack James Jane Jean Jenny Jim Joan Joe John Josephine
Julia Karl Kate Laura Leo Leonard Lewis Lily Louis Louise Lucy Luke Mabel Margaret Maria Mark Martha Martin
Mary Matthew Max Maud Michael Mildred Molly Nancy Ned Nell Nina Nora Olive Oliver Oscar Otto Paul Peter
Philip Polly Ralph Robert Rosa Rose Roy Ruth Sam Sarah Silas Simon Sophie Stella Susan Theodore Thomas Tom
Victor Violet Walter
""")
assert len(FIRST_NAMES) == 128, len(FIRST_NAMES)

# Surnames of the known people: "Adam Barker" is always two tokens.
SURNAMES = _w("""
Baker Barker Barton Bell Bishop Brook Burton Carter Chandler Clark Cole Cooper Cross Dale Draper Ellis Field
Fisher Fletcher Ford Foster Fowler Gardner Gibson Graves Hale Harper Hawkins Hobbs Holt Hunter Hurst Keller
Kemp Knight Lamb Lane Marsh Mason Mercer Miller Moss Nash Norton Page Parker Pierce Porter Potter Quinn Reed
Rowe Sawyer Sharp Shaw Slater Stone Thorn Tucker Turner Wade Walsh Webb Weaver
""")
assert len(SURNAMES) == 64, len(SURNAMES)

TOWNS = _w("""
Alder Amber Arden Ashby Avon Barrow Bexley Bolton Bristol Burnley Calder Camden Chester Clifton Corby Crewe
Dalton Derby Dover Dudley Durham Easton Elgin Epsom Exeter Fenton Formby Garston Grimsby Halton Harlow Hedon
Hexham Ilford Jarrow Kendal Kirkby Lancaster Ledbury Lincoln Ludlow Malton Matlock Morley Newton Norwich
Oakham Oldham Otley Penrith Preston Ramsey Redcar Ripon Rugby Selby Skipton Stafford Tenby Thirsk Ulverston
Wakefield Whitby Yarm
""")
assert len(TOWNS) == 64, len(TOWNS)

JOBS = _w("""
actor artist baker banker barber builder butcher carpenter chemist clerk cook dancer dentist doctor driver
editor engineer farmer fisherman gardener guard hunter judge lawyer librarian mechanic merchant miner
musician nurse painter pilot poet porter printer sailor singer smith soldier tailor teacher waiter weaver
writer
""")

COMPANIES = _w("""
Acorn Anchor Apex Argus Arrow Atlas Aurora Beacon Bison Cedar Cobalt Comet Condor Copper Coral Corona Crane
Crescent Crown Crystal Cyclone Delta Diamond Dolphin Eagle Echo Ember Emerald Falcon Fern Galaxy Garnet
Glacier Granite Harbor Hawk Hazel Helix Heron Horizon Ibis Indigo Iris Ivory Jade Jaguar Jasper Juniper
Kestrel Lantern Laurel Linden Lotus Lynx Magnet Maple Marble Meteor Mosaic Neptune Nova Oasis Onyx Opal
Orbit Orchid Orion Osprey Otter Panther Pearl Pelican Phoenix Pioneer Prism Quartz Raven Saturn Sierra
Zenith
""")
assert len(COMPANIES) == 80, len(COMPANIES)

SCHOOLS = _w("""
Abbot Beaumont Brandon Calvert Clement Crawford Dunbar Eaton Fairfax Gilbert Godwin Hamilton Harvard
Hastings Kensington Langley Lowell Marlow Merton Milton Newman Oxford Pembroke Radley Ridley Sheldon Stanton
Trinity Warwick Winchester
""")
assert len(SCHOOLS) == 30, len(SCHOOLS)

OBJECTS = _w("""
apron axe bag ball banner basket bell belt blanket boat book boot bottle bow bowl box bracelet broom brush
bucket button candle cap carpet chain chair chest clock cloak coat coin comb compass crown cup curtain doll
drum fan flag flute fork hammer hat helmet horn jar jug kettle key kite knife ladder lamp letter lock map
mask mirror mug needle net paddle pan pencil pillow pipe plate pot puppet purse ring rope rug sack saddle
scarf shawl shell shield shirt shoe shovel spade spoon stick stool sword table telescope tent top towel
trumpet umbrella vase violin wagon whistle
""")

ANIMALS = _w("""
badger bear beaver bee bird calf camel cat cow crab crow deer dog donkey dove duck elephant fish fox frog
goat goose hare hen horse kitten lamb lion monkey mouse mule owl ox parrot pig pigeon pony puppy rabbit rat
robin seal sheep snail snake spider squirrel swan tiger turkey turtle whale wolf
""")

FOODS = _w("""
apples beans berries bread butter cabbage cake candy carrots cheese cherries chocolate coffee corn cream
eggs figs grapes honey jam lemons milk mushrooms nuts oats olives onions oranges pancakes peaches pears peas
pie plums porridge potatoes pudding rice salad soup sugar tea toast tomatoes
""")

COLORS = _w("black blue brown gold gray green orange pink purple red silver white yellow")

HOBBIES = _w("""
archery baking boxing carving chess climbing cricket cycling dancing drawing fencing fishing football
gardening golf hiking hockey hunting juggling knitting painting poetry pottery puzzles reading riding rowing
running sailing sewing singing skating skiing swimming tennis walking weaving writing
""")

INSTRUMENTS = _w("banjo cello drum fiddle flute guitar harp horn lute organ piano trumpet viola violin")

# Answers of needles, key-value lists and passkeys: plain lower-case words that no other list of the world
# uses.
CODES = _w("""
ablaze acid agent album alley alloy angle ankle apple arch arena atom attic aunt autumn barrel basin battle
bay beam bench blade bone branch brick bridge bubble bullet cabin canal canyon carbon castle cattle cave
cell chalk cherry chief choir circle city clay cliff cloud clover coast cotton cradle crater creek crust
curve dawn desert dragon dust east edge elbow engine eye fabric feather fence fever flame flood flour foam
fog forest frost fruit garden gas gate ghost giant glass globe glove grain grass gravel grove gulf hall
harvest heart hill hotel ice iron island jungle lake lawn leaf lemon lime linen magic meadow metal mill mist
moon mud north ocean opera palace paper park pepper petal planet plum pond powder prairie prince pulse rain
ranch ridge river rock root salt sand shadow silk sky smoke snow south spark spring star steam steel storm
stream summer sun swamp temple thunder tide timber tower trail tunnel valley velvet village wave west wheat
wind winter wire wood wool
""")

MONTHS = _w("January February March April May June July August September October November December")
WEEKDAYS = _w("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
NUMBER_WORDS = _w("zero one two three four five six seven eight nine ten eleven twelve")

# Syllables of the invented names: one inventory for training and evaluation names, so that no syllable tells
# them apart.
NAME_FIRST = _w("""
Bal Bel Bor Bran Cal Car Cor Dal Dar Del Dor Dun El Fal Far Fen Gal Gar Gor Hal Har Hol Jar Jor Kal Kar Kel
Kor Lan Lar Lor Mal Mar Mel Mor Nal Nor Or Pal Per Quen Ral Ran Ril Sal Sel Sor Tal Tar Tel Tor Ul Val Var
Vel Vor Wen Wil Yar Zan Zel Zor
""")
NAME_MIDDLE = _w("a ba da di do e ga i ka la li lo ma mi mo na ni no o ra ri ro sa ta ti to va vi")
NAME_LAST = _w("""
bert dan das den dic don dra far fin gan gen ger go gus kan ken las len lin lis man men mir mund nak nas nel
nia nik nis rak ran ras ric rin ron rus sen sha son tan tas tha thin tin tor tos van ven vik vin wen win wyn
""")
