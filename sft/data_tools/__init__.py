"""Data before the training: filtered by rules and a model's scores, looked at, translated.

    rows -> rules -> scores -> kept | rejected | undecided    `sft filter`
                     rejected -> page -> taken back           `sft review`, `sft filter --accept`
    rows -> each text -> checked -> translated | undecided    `sft translate`

Every row that was read is in exactly one file in the end; nothing is deleted. The replies of the
endpoint are kept in a file, and that is all that a killed run needs: started again it goes through
all rows anew and asks only what was not answered yet.
"""
