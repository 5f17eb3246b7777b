# The loader of one view, in the words of MMSelfSup 1.x.
_base_ = '../v1/_base_/runtime.py'

crop = dict(type='RandomResizedCrop', size=224, scale=(0.2, 1.0), backend='pillow', interpolation='bicubic')
load = dict(type='LoadImageFromFile')
flip = dict(type='RandomFlip', prob=0.5)
pack = dict(type='PackSelfSupInputs', meta_keys=['img_path'])
train_dataloader = dict(
    num_workers=8, drop_last=True, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='mmcls.ImageNet', data_root='data/imagenet/', ann_file='meta/train.txt',
        data_prefix=dict(img_path='train/'), pipeline=[load, crop, flip, pack]))
numbers = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
optim_wrapper = dict(
    type='AmpOptimWrapper', loss_scale='dynamic',
    paramwise_cfg=dict(custom_keys={
        'ln': dict(decay_mult=0.), 'bias': dict(decay_mult=0.), 'pos_embed': dict(decay_mult=0.),
        'mask_token': dict(decay_mult=0.), 'cls_token': dict(decay_mult=0.)}))
