from mmpr.cli import main

main()
