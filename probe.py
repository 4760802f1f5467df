import sys; sys.path.insert(0,'/tmp/b3/python')
