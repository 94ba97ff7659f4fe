"""A machine's memberships in private swarms: what it keeps of each, and how members keep strangers out.

folder         what a machine knows of a swarm: its folder on the disk; start here
roster         the members, revocations and invitations of a swarm, as all members know them
own            this process's membership: its certificate, and how others stand
gate, seal     the directory's requests and answers, only between members
ticket         an invitation as one line of text; packed: the addresses in it
desk           what members ask each other about membership: letting in, renewing, comparing rosters
rounds         keeping up: spreading news, renewing our own certificate in time
"""
