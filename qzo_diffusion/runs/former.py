"""The embedded model as it was: its weights change with versions, and numbers that were tuned over
former weights fit no others.

A row is the hash of the codes of one quantization of former weights (`frozen_fingerprint`; of the
scales where a run trains the codes), with the last commit that ships those weights. Rows of the
weights that ship now may be here already: they are compared only where a run does not fit."""

FORMER = {
    "2aa71ad": (
        "7965f0ca47a71b1b55b951ce360100a0",  # nf4, block 32, bnb
        "2a28ec89a696b7abdde52b455dea1c9f",  # nf4, block 64, bnb
        "4a7d96e5356fb0c16474d67a41911935",  # nf4, block 128, bnb
        "85925cf3ff37337941de2e5cfa16431d",  # nf4, block 256, bnb
        "55c98eb26f6b0c135282cb54a3670e2c",  # nf4, block 32, reference
        "6de5b2ad6cebe98d3a6cb8cf19227f9c",  # nf4, block 64, reference
        "57b17a3ddae1aec94154e7be3319d384",  # nf4, block 128, reference
        "ad9063c8c9d37afb4ef12cd752825a7a",  # nf4, block 256, reference
        "5aedec29449bcac7c9f601ecac0f932d",  # fp4, block 32, bnb
        "5cd45424ef3038dbd85c6ec96e153307",  # fp4, block 64, bnb
        "dc49f16d24c5fab6c99e9017413e7f09",  # fp4, block 128, bnb
        "609408e2bbfdb265702f7f22678e712b",  # fp4, block 256, bnb
        "1bd079d948d2f94efc796f92bccbdfa9",  # fp4, block 32, reference
        "bf96e31bbc3062a5f6d66a8f6c87d356",  # fp4, block 64, reference
        "6bcc8053f647b720c1b5741a9c5dd1c9",  # fp4, block 128, reference
        "f1efba36c8ea08d1f548f68e95a3b3a0",  # fp4, block 256, reference
        "5f7ec1353358871126b463d57a38a2cb",  # int8, intgrid
        "b06d449fc3583e6f63c3a86d63446680",  # int4, intgrid
        "7f4d20adc5a2534b1af82cab41444d8e",  # fp8, intgrid
        "4fefe814e4dc386d3c3dd5ec8d62a9b2",  # codes of int8 and fp8, intgrid
        "3ba7edd47f6f3e695eed0bc86e66335b",  # codes of int4, intgrid
    ),
    # of the weights that ship now: a name that stands for the last commit that will have them
    "shipped": (
        "9e8bd72e146700ad3bb5872cae13b59e",  # nf4, block 32, bnb
        "f4631c8ea123be2fb592b3be84c3f10d",  # nf4, block 64, bnb
        "05df5ca501e92a60040f50f45ec6a1b4",  # nf4, block 128, bnb
        "13fe5a66d8797d73bd4d4eb801cba306",  # nf4, block 256, bnb
        "229e8efe04e5b8f93eeca3a84f26d494",  # nf4, block 32, reference
        "4a94f1ff48ef4f0d5e86c2feab60c6bb",  # nf4, block 64, reference
        "24700782782d78cd98e8a2e236c53215",  # nf4, block 128, reference
        "b1882a6dc4d45f49ad9f21683ae5e5c0",  # nf4, block 256, reference
        "a172cac4786b7aa50cf10794b4217751",  # fp4, block 32, bnb
        "99f713045cbe2761991399a07c520923",  # fp4, block 64, bnb
        "9ae20336b857f08f991389ea77fb1c5f",  # fp4, block 128, bnb
        "9d7bc7ebdaa9eb015349810b1f2ff301",  # fp4, block 256, bnb
        "44cacf27b8e8595388ab781b8dbfb26a",  # fp4, block 32, reference
        "277a37636f75636f2d768aec9eb9f66a",  # fp4, block 64, reference
        "ed90cc38734e3a830641c3a6428d6c7b",  # fp4, block 128, reference
        "a4da8e7955c97f9f77fb652f934852d4",  # fp4, block 256, reference
        "43a9418f3d75821dca5f94e90eb1068b",  # int8, intgrid
        "daa48c034b529b0347b67e610743f07d",  # codes of int8 and fp8, intgrid
        "b115fe5c66279b49178c92ef548a949a",  # int4, intgrid
        "34491c6cf5afbad6e4ecf607ff3947f2",  # codes of int4, intgrid
        "b41bacd2a8c67edac7041be463e7460d",  # fp8, intgrid
    ),
}


def former_commit(codes: str | None) -> str | None:
    """The commit with the embedded model that these are the codes of; None: of no former one."""
    return next((commit for commit, known in FORMER.items() if codes in known), None)


def remedy_for(codes: str | None, here: str | None) -> str | None:
    """How to use numbers that belong to `codes`, where the base has the codes `here`; None where
    they are of no former embedded model, or the base is that model in another quantization.
    """
    commit = former_commit(codes)
    if commit is None or commit == former_commit(here):
        return None
    return (
        f"check out commit {commit}, the last one with the embedded model that this was made on "
        f"(`git checkout {commit}`), or train again on the embedded model of this version"
    )
