# Where the images are, as a variable for the files below.
root = 'data/imagenet/'
source = dict(type='ImageNet', data_prefix=root + 'train', ann_file=root + 'meta/train.txt')
