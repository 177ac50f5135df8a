from internvl.cli import main

main()
