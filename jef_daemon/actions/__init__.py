"""Three executors that come with the daemon.

checksum   digest of a file or a tree, with byte progress
copy       verified, atomic copy of a file or a tree
command    any program the operator configures
roots      the folders that checksum and copy may touch
bytes      progress over bytes and files
"""
