# Where the pictures are, as a variable for the files below.
root = 'data/imagenet'
source = dict(type='ImageNet', data_prefix=f'{root}/train', ann_file=f'{root}/meta/train.txt')
